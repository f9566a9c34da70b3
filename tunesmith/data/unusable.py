"""The exception of a row that can't be used."""

from __future__ import annotations


class Unusable(Exception):
    """A row that can't become one of ours: a reason code and what is wrong with it."""

    def __init__(self, reason: str, why: str) -> None:
        super().__init__(why)
        self.reason, self.why = reason, why
