"""ClearML: a server, or a session file that `Task.import_offline_session` uploads."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from tunesmith.train.trackers import Log, TrackerSection


class ClearMl(TrackerSection):
    """A task at a ClearML server."""

    package: ClassVar[str] = "clearml"

    kind: Literal["clearml"] = "clearml"
    project: str = "tunesmith"
    """The project that the task goes to."""
    mode: Literal["online", "offline"] = "online"
    """offline writes a session under ~/.clearml (or CLEARML_CACHE_DIR), to be imported later."""

    def open(self, name: str, folder: Path, settings: dict[str, Any]) -> Log:
        return _Log(self, name, settings)


class _Log:
    def __init__(self, section: ClearMl, name: str, settings: dict[str, Any]) -> None:
        from clearml import Task

        if section.mode == "offline":
            Task.set_offline(True)
        # Nothing of the process but what is logged here: it would wrap argparse, torch.save and the terminal.
        self._task: Any = Task.init(
            section.project,
            name,
            reuse_last_task_id=False,
            auto_connect_arg_parser=False,
            auto_connect_frameworks=False,
            auto_resource_monitoring=False,
            auto_connect_streams=False,
        )
        self._task.connect(settings)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._task.get_logger().report_scalar(name, name, value, step)

    def text(self, step: int, name: str, text: str) -> None:
        self._task.get_logger().report_text(f"{name}, step {step}: {text}", print_console=False)

    def close(self, finished: bool) -> None:
        if not finished:
            self._task.mark_stopped()
        self._task.close()
