"""TensorBoard: event files in a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from tunesmith.train.trackers import Log, TrackerSection


class TensorBoard(TrackerSection):
    """Event files that `tensorboard --logdir` shows."""

    package: ClassVar[str] = "tensorboard"

    kind: Literal["tensorboard"] = "tensorboard"
    folder: str | None = None
    """Where they go; the run's `tensorboard/` if not given."""

    def open(self, name: str, folder: Path, settings: dict[str, Any]) -> Log:
        return _Log(Path(self.folder) / name if self.folder else folder / "tensorboard", settings)


class _Log:
    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder))
        self._writer.add_text("recipe", "\n".join(f"    {k}: {v}" for k, v in settings.items()))

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._writer.add_text(name, text, step)

    def close(self, finished: bool) -> None:
        self._writer.close()
