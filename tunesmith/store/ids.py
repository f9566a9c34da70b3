"""Names of rows."""

from __future__ import annotations

import secrets
import string

LETTERS = string.ascii_letters + string.digits


def new(prefix: str, length: int = 24) -> str:
    """`prefix` and random letters and digits: at 24 of them, 142 bits."""
    return prefix + "".join(secrets.choice(LETTERS) for _ in range(length))
