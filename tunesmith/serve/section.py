"""`serve`: how models answer."""

from __future__ import annotations

from pydantic import Field

from tunesmith.section import Section


class ServeSection(Section):
    """How a model is served."""

    max_body: int = Field(8 << 20, ge=1024)
    """Largest request in bytes."""
    cors: tuple[str, ...] = ()
    """Origins whose pages may call from a browser; none, if not given."""
