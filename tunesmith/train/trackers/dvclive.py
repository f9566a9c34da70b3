"""DVCLive: TSV files that DVC and its editor extension show."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from tunesmith.train.trackers import Log, TrackerSection


class DvcLive(TrackerSection):
    """A folder of TSV files, and a DVC experiment where the run is in a DVC repository."""

    package: ClassVar[str] = "dvclive"

    kind: Literal["dvclive"] = "dvclive"
    folder: str | None = None
    """Where they go; the run's `dvclive/` if not given."""
    experiment: bool = False
    """Keep a DVC experiment at the end; needs a DVC repository."""

    def open(self, name: str, folder: Path, settings: dict[str, Any]) -> Log:
        return _Log(self, Path(self.folder) / name if self.folder else folder / "dvclive", settings)


class _Log:
    def __init__(self, section: DvcLive, folder: Path, settings: dict[str, Any]) -> None:
        from dvclive import Live

        self._texts = folder / "texts"
        self._live = Live(str(folder), save_dvc_exp=section.experiment, dvcyaml=None)
        self._live.log_params(settings)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._live.step = step
        for name, value in values.items():
            self._live.log_metric(name, value)
        self._live.make_summary()

    def text(self, step: int, name: str, text: str) -> None:
        path = self._texts / f"{name}-{step:06d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    def close(self, finished: bool) -> None:
        self._live.end()
