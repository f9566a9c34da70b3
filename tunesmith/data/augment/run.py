"""`data.augment`: more training rows, after the split, so that nothing made of a row can be on another side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.conversation.message import Conversation
from tunesmith.data.augment.base import Account, Making, Means, Seen, plain
from tunesmith.data.groups import digest
from tunesmith.errors import DataError

if TYPE_CHECKING:
    from tunesmith.data.ledger import Ledger

LIKE_HELD_OUT = 0.8


def augmented(
    makings: Sequence[Making],
    parts: Mapping[str, Sequence[Conversation]],
    means: Means,
    fits: Callable[[Conversation], bool],
    ledger: Ledger,
) -> tuple[list[Conversation], list[dict[str, Any]]]:
    """Rows that were made of the training rows, and what each way of making came to.

    Every way starts from the rows that were read. What asks the same as a row that is there, is like one that is
    held out, or does not fit the model is left out and counted.

    Raises:
        DataError: one can't start from rows of this kind; nothing was asked for yet.
    """
    _startable(makings, parts["train"][0].kind)
    rows: list[Conversation] = []
    told = []
    held = [row.question for part in ("validation", "test") for row in parts[part]]
    held_out, same = Seen(held), {plain(question) for question in held}
    asked = {digest(row.question) for row in parts["train"]}
    for making in makings:
        account = Account(str(getattr(making, "kind", "")))
        for row in making.make(parts["train"], means, account):
            wrong = (
                "unchanged" if digest(row.question) in asked
                else "held out" if plain(row.question) in same or held_out.like(row.question) >= LIKE_HELD_OUT
                else "" if fits(row) else "too long"
            )  # fmt: skip
            if wrong:
                account.filtered[wrong] += 1
                continue
            asked.add(digest(row.question))
            rows.append(row)
            account.made += 1
        if account.made:
            ledger.made["augment"] += account.made
        told.append(account.as_dict())
    return rows, told


def _startable(makings: Sequence[Making], kind: str) -> None:
    for number, making in enumerate(makings):
        if kind not in making.made_of:
            name = getattr(making, "kind", type(making).__name__)
            raise DataError(
                f"{name} starts from {' and '.join(making.made_of)} rows, and these are {kind} rows",
                where=f"data.augment.{number}",
                fix="Leave it out for such rows.",
            )
