"""MLflow: a server, or a database file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, ClassVar, Literal

from tunesmith.train.trackers import Log, TrackerSection

LONGEST_PARAMETER = 500  # characters, which every store takes


class Mlflow(TrackerSection):
    """A run in an MLflow store."""

    package: ClassVar[str] = "mlflow"

    kind: Literal["mlflow"] = "mlflow"
    uri: str | None = None
    """The tracking server or store, such as http://host:5000 or sqlite:///mlflow.db; what MLFLOW_TRACKING_URI says if
    not given, else the run's `mlflow.db`."""
    experiment: str = "tunesmith"
    """The experiment that the run belongs to; made if it is not there."""

    def open(self, name: str, folder: Path, settings: dict[str, Any]) -> Log:
        return _Log(self, name, folder, settings)


class _Log:
    def __init__(self, section: Mlflow, name: str, folder: Path, settings: dict[str, Any]) -> None:
        import os

        from mlflow import MlflowClient
        from mlflow.entities import Param

        there = section.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(folder / 'mlflow.db').resolve()}"
        self._client = MlflowClient(tracking_uri=there)
        found = self._client.get_experiment_by_name(section.experiment)
        place = (folder / "mlflow").resolve().as_uri() if there.startswith("sqlite:") else None
        number = found.experiment_id if found else self._client.create_experiment(section.experiment, place)
        self._id = self._client.create_run(number, run_name=name).info.run_id
        self._client.log_batch(self._id, params=[Param(k, str(v)[:LONGEST_PARAMETER]) for k, v in settings.items()])

    def numbers(self, step: int, values: dict[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, metrics=[Metric(k, v, now, step) for k, v in values.items()])

    def text(self, step: int, name: str, text: str) -> None:
        self._client.log_text(self._id, text, f"{name}/step-{step:06d}.txt")

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")
