"""The child's side of `child.py`: messages are lines of JSON, and the end of its input is the end of the process."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from tunesmith.errors import TunesmithError, first_line


class Wire:
    """Standard input and output, kept for messages: what libraries print goes to the error output."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)
        sys.stdout = sys.stderr
        self._lock = threading.Lock()

    def told(self) -> Iterator[dict[str, Any]]:
        """Messages as they come, until the parent closes the pipe or has ended."""
        for line in sys.stdin:
            yield json.loads(line)

    def tell(self, **message: Any) -> None:
        with self._lock:
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()

    def refuse(self, error: Exception) -> None:
        """Say why the model can't be served."""
        known = error.as_dict() if isinstance(error, TunesmithError) else {}
        what = f"{type(error).__name__}: {first_line(error)}"
        self.tell(error={"type": "ModelError", "what": what, "where": None, "fix": None} | known)
