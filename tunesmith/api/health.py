"""Whether it lives, and whether it can answer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

router = APIRouter(tags=["health"])


@router.get("/health")
async def health() -> dict[str, Any]:
    """The process answers."""
    return {"status": "ok"}
