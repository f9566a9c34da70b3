"""What one model answers to the test rows, and how likely it finds what they hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tunesmith.conversation.message import Conversation, Message, Preference, Text
from tunesmith.errors import DataError
from tunesmith.evaluate.metrics import Answers, Metric
from tunesmith.evaluate.mistakes import FEWEST_ROWS, about
from tunesmith.evaluate.section import EvaluateSection
from tunesmith.inference.engine import Sampling
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Ask, Reply
from tunesmith.progress import bar


@dataclass(frozen=True)
class Side:
    """One model's answers, and each row's replies over all rounds."""

    answers: Answers
    replies: list[list[Reply]]


def answered(
    section: EvaluateSection,
    subject: Kept,
    rows: Sequence[Conversation],
    metrics: Sequence[Metric],
    limit: int,
    side: str,
    seed: int,
    kind: str,
) -> Side:
    """One model's answers to the rows, and the likelihoods that the metrics need."""
    prompts = [Ask.of(row) for row in rows]
    rounds: list[list[Reply]] = []
    for number in range(section.seeds if any(not m.likelihood for m in metrics) else 0):
        sampling = Sampling(section.heat, seed + number) if section.heat else None
        title = f"Answers, {side}" + (f", round {number + 1}" if section.seeds > 1 else "")
        with bar(title, len(rows)) as progress:
            rounds.append(subject.replies(prompts, limit, progress.advance, sampling))
    nll, tokens = [float("nan")] * len(rows), [0] * len(rows)
    if subject.scores:
        with bar(f"Likelihood, {side}", len(rows)) as progress:
            likely = subject.likelihoods(rows, progress.advance)
        nll, tokens = [s.nll for s in likely], [s.tokens for s in likely]
    chooses = any(m.chooses for m in metrics)
    rounds = rounds or [[Reply("")] * len(rows)]
    texts = [[r.text for r in given] for given in rounds]
    answers = Answers(
        texts[0],
        [row.text if isinstance(row, Text) else row.answer for row in rows],
        nll,
        tokens,
        [row.metadata for row in rows],
        texts if len(texts) > 1 else (),
        _choices(subject, rows, side) if chooses else (),
        _pairs(subject, rows, side) if subject.scores else (),
    )
    return Side(answers, [list(of_row) for of_row in zip(*rounds, strict=True)])


def embedded(subject: Kept, rows: Sequence[Conversation]) -> tuple[str, Any] | None:
    """The model's name and its embeddings of what the rows are about; none of what is not on this machine."""
    if len(rows) < FEWEST_ROWS:
        return None
    texts = [about(row.prompt, row.text if isinstance(row, Text) else row.answer) for row in rows]
    with bar("What rows are about", len(rows)) as progress:
        vectors = subject.embedded(texts, progress.advance)
    return None if vectors is None else (subject.name, vectors)


def _choices(subject: Kept, rows: Sequence[Conversation], side: str) -> list[list[tuple[str, float]]]:
    """Each row's choices and their negative log-likelihoods; the test rows' labels where a row names none."""
    labels = sorted({row.answer.strip() for row in rows})
    odd = next((row for row in rows if not isinstance(row.metadata.get("choices") or [], list)), None)
    if odd is not None:
        what = f"its choices ({str(odd.metadata['choices'])[:60]!r}) are no list"
        raise DataError(what, where=odd.id, fix="Give a list of texts: choices: [yes, no].")
    choices = [[str(c) for c in row.metadata.get("choices") or labels] for row in rows]
    made = [_with_answer(row, text) for row, texts in zip(rows, choices, strict=True) for text in texts]
    with bar(f"Choices, {side}", len(made)) as progress:
        scores = iter(subject.likelihoods(made, progress.advance))
    return [[(text, next(scores).nll) for text in texts] for texts in choices]


def _pairs(subject: Kept, rows: Sequence[Conversation], side: str) -> list[tuple[float, float]]:
    """What the endings of preferences get per token; nothing of other rows."""
    made = [conversation for row in rows if isinstance(row, Preference) for conversation in row.conversations]
    with bar(f"Pairs, {side}", len(made)) as progress:
        found = [s.nll / max(s.tokens, 1) for s in subject.likelihoods(made, progress.advance)]
    return list(zip(found[::2], found[1::2], strict=True))


def _with_answer(row: Conversation, text: str) -> Conversation:
    return replace(row, messages=(*row.prompt, Message("assistant", text)))
