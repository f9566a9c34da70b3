"""People's judgements of answers, read from a file, to hold a judge against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.errors import DataError
from tunesmith.evaluate.asking import Duel
from tunesmith.evaluate.files import local_file, rows_of

WINNERS = {"a": "a", "b": "b", "tie": "tie", "model_a": "a", "model_b": "b", "tie (inconsistent)": "tie"}


@dataclass(frozen=True)
class HumanDuel:
    """Two answers, and which one a person found better: a, b or tie."""

    duel: Duel
    winner: str


@dataclass(frozen=True)
class HumanScore:
    """An answer, and the score that a person gave it."""

    question: str
    answer: str
    score: float


Labels = Sequence[HumanDuel] | Sequence[HumanScore]


def human_labels(name: str, folder: Path) -> Labels:
    """The rows of a .jsonl or .csv file, all of one kind.

    Raises:
        DataError: there are none, or one can't be read; names it.
    """
    path = local_file(name, folder)
    lines = rows_of(path, (), "people's judgements")
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(_label(line))
        except (KeyError, ValueError, TypeError, IndexError) as error:
            raise DataError(
                f"is no judgement ({type(error).__name__}: {error})",
                where=f"{path.name}:{number}",
                fix="Give prompt, a, b, winner (a, b or tie), or prompt, answer, score.",
            ) from error
    if len({type(label) for label in found}) > 1:
        raise DataError(
            "holds both winners and scores",
            where=str(path),
            fix="Give rows of one kind: prompt, a, b, winner; or prompt, answer, score.",
        )
    return found  # type: ignore[return-value]


def _label(line: Mapping[str, Any]) -> HumanDuel | HumanScore:
    if "conversation_a" in line:  # MT-Bench's human judgements: a turn of two conversations
        until = 2 * int(line.get("turn") or 1)
        a, b = (line[f"conversation_{which}"][:until] for which in "ab")
        question = "\n\n".join(m["content"] for m in a if m["role"] == "user")
        answers = ("\n\n".join(m["content"] for m in turns if m["role"] == "assistant") for turns in (a, b))
        return HumanDuel(Duel(question, None, *answers), WINNERS[line["winner"].strip().lower()])
    if "winner" in line:
        reference = line.get("reference") or None
        return HumanDuel(
            Duel(str(line["prompt"]), reference, str(line["a"]), str(line["b"])),
            WINNERS[str(line["winner"]).strip().lower()],
        )
    return HumanScore(str(line["prompt"]), str(line["answer"]), float(line["score"]))
