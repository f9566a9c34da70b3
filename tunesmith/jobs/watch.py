"""What a job's run has come to, read from its folder while another process writes there."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tunesmith.runs import Run, read_jsonl


class Metrics:
    """New lines of metrics.jsonl. A run that goes on from a checkpoint drops what lies beyond it and writes it again;
    steps that were told are not told twice."""

    def __init__(self, run: Run, told: int) -> None:
        self.path, self.told, self._place = run.metrics, told, 0

    def new(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_size < self._place:
                self._place = 0
            with self.path.open("rb") as file:
                file.seek(self._place)
                for line in file:
                    if not line.endswith(b"\n"):
                        return
                    self._place += len(line)
                    with contextlib.suppress(ValueError):
                        row = json.loads(line)
                        if row["step"] > self.told:
                            self.told = row["step"]
                            yield row


def snapshots(run: Run) -> dict[int, Path]:
    """Whole ones, by step."""
    return {int(path.name.removeprefix("step-")): path for path in sorted(run.snapshots.glob("step-*"))}


def lines_of(run: Run) -> list[dict[str, Any]]:
    return read_jsonl(run.metrics)


def newest_checkpoint(run: Run) -> str | None:
    return max((path.name for path in run.checkpoints.glob("step-*")), default=None)
