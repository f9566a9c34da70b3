"""Weights & Biases, with a server or into a folder that `wandb sync` uploads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from tunesmith.train.trackers import Log, TrackerSection


class Wandb(TrackerSection):
    """A run at Weights & Biases."""

    package: ClassVar[str] = "wandb"

    kind: Literal["wandb"] = "wandb"
    project: str = "tunesmith"
    """The project that the run goes to."""
    entity: str | None = None
    """The user or team; the one that is logged in if not given."""
    mode: Literal["online", "offline"] = "online"
    """offline writes into the run's `wandb/`, for `wandb sync` later."""

    name: str | None = None
    """What the run is called there; as here if not given."""
    tags: list[str] = []
    """To find it again."""

    def open(self, name: str, folder: Path, settings: dict[str, Any]) -> Log:
        return _Log(self, name, folder, settings)


class _Log:
    def __init__(self, section: Wandb, name: str, folder: Path, settings: dict[str, Any]) -> None:
        import wandb

        self._wandb = wandb
        self._run: Any = wandb.init(
            project=section.project,
            entity=section.entity,
            name=section.name or name,
            tags=section.tags or None,
            dir=str(folder),
            mode=section.mode,
            config=settings,
            # It asks for a key on a terminal otherwise, and rewrites what is printed.
            settings=wandb.Settings(silent=True, console="off", login_timeout=20, init_timeout=60),
        )

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def text(self, step: int, name: str, text: str) -> None:
        self._run.log({name: self._wandb.Html(f"<pre>{_escaped(text)}</pre>")}, step=step)

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def _escaped(text: str) -> str:
    from html import escape

    return escape(text)
