"""Values of tables and databases -> what JSON has, so that every row is plain once it is inside."""

from __future__ import annotations

import base64
import math
from decimal import Decimal
from numbers import Real
from typing import Any, TypeGuard


class Bytes(str):
    """Bytes as base64: plain text to whatever keeps or compares it, and still known for no text."""


def is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and not isinstance(value, Bytes)


def plain(value: Any) -> Any:
    """A value as JSON has it: dates and times in ISO 8601, decimals as text to their last digit, bytes in base64. NaN
    and infinities are null: tables write what is missing so."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Real):  # numpy's own among them
        return float(value) if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return Bytes(base64.b64encode(value).decode()) if isinstance(value, bytes) else written(value)


def written(value: Any) -> str:
    """What JSON has no form for, as text."""
    if isinstance(value, Decimal):
        return format(value, "f")  # str() writes a zero of eight places as 0E-8
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
