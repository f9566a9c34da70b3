"""Libraries that come with an extra."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tunesmith.errors import MachineError


def need(module: str, where: str, extra: str = "data") -> Any:
    """A library that comes with an extra.

    Raises:
        MachineError: it is not installed; names the extra.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise MachineError(
            f"needs {error.name or module}, which is not installed",
            where=where,
            fix=f"pip install 'tunesmith[{extra}]'",
        ) from error
