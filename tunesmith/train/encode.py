"""Rows as what a method learns from."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith import plugins
from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Renderer
from tunesmith.errors import DataError
from tunesmith.progress import bar
from tunesmith.train.objectives.method import Example, Method
from tunesmith.train.section import TrainSection


def encode(section: TrainSection, rows: Sequence[Conversation], renderer: Renderer) -> list[Example]:
    """What the method makes of the rows.

    Raises:
        DataError: rows are of another kind than the method learns from; or one has no token to learn from, or is
            longer than `train.max_length`.
    """
    method: Method = section.method
    other = next((row for row in rows if row.kind != method.takes), None)
    if other is not None:
        fitting = [name for name in sorted(plugins.known("objective")) if _takes(name) == other.kind]
        raise DataError(
            f"method {method.kind} learns from {method.takes} rows, and this is a {other.kind} row",
            where=other.id,
            fix=f"Take train.method: {' or '.join(fitting)}; or say how to read the rows otherwise: layout, columns.",
        )
    examples: list[Example] = []
    with bar("Tokens", len(rows)) as progress:
        for made in method.encode(rows, renderer, section.max_length):
            examples += made
            progress.advance()
    for example in examples:
        if not all(sequence.trained for sequence in example.sequences):
            raise DataError(
                "no token of this row carries loss",
                where=example.row,
                fix="Check the roles, weights and template.",
            )
        if len(example) > section.max_length:
            raise DataError(
                f"has {len(example)} tokens, train.max_length is {section.max_length}",
                where=example.row,
                fix="Raise train.max_length, or set data.over_length.",
            )
    return examples


def _takes(method: str) -> str:
    found: type[Method] = plugins.load("objective", method)
    return found.takes
