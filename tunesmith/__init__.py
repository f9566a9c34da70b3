"""Tunesmith: turn your own data into a better language model, and prove that it is better.

import tunesmith as ts

run = ts.run("quickstart")
run.scorecard["verdict"]
run.chat("My kettle arrived broken, I want my 49.90 back.")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tunesmith.errors import TunesmithError
    from tunesmith.pipeline import Result, open_run, run
    from tunesmith.preview import check, plan
    from tunesmith.recipe import Recipe

__version__ = "0.1.0"

_PUBLIC = {
    "run": "tunesmith.pipeline",
    "open_run": "tunesmith.pipeline",
    "Result": "tunesmith.pipeline",
    "check": "tunesmith.preview",
    "plan": "tunesmith.preview",
    "Recipe": "tunesmith.recipe",
    "TunesmithError": "tunesmith.errors",
}
__all__ = ["Recipe", "Result", "TunesmithError", "__version__", "check", "open_run", "plan", "run"]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used, so that importing tunesmith stays light."""
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'tunesmith' has no attribute '{name}'")


def __dir__() -> list[str]:
    return __all__
