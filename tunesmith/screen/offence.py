"""How probable it is that a text offends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from tunesmith.errors import ModelError, first_line
from tunesmith.screen.library import need

NAMES = ("toxic", "obscene", "insult", "threat", "hate", "offensive")


def offence(texts: Sequence[str], model: str | None, labels: tuple[str, ...], where: str) -> list[float]:
    """For each text, how probable it is: by a classifier's labels, or by the linear one of alt-profanity-check.

    Raises:
        ModelError: the classifier can't be loaded, or has none of the labels.
        MachineError: the library is not installed.
    """
    if model is not None:
        return classifier(model, labels, where)(texts)
    return [float(p) for p in need("profanity_check", where).predict_prob(list(texts))]


@cache
def classifier(model: str, labels: tuple[str, ...], where: str) -> Callable[[Sequence[str]], list[float]]:
    """A text classifier as a function: for each text, the highest probability of a label that counts (all whose name
    says so, if none are given)."""
    from transformers import pipeline

    try:
        classify = pipeline("text-classification", model=model, top_k=None, truncation=True, device="cpu")
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the classifier can't be loaded ({first_line(error)})",
            where=f"{where}.model",
            fix="Name a folder or a hub model for text classification, such as unitary/toxic-bert.",
        ) from error
    known = list(classify.model.config.id2label.values())
    wanted = {label.casefold() for label in labels}
    counting = [
        label
        for label in known
        if (label.casefold() in wanted if wanted else any(n in label.casefold() for n in NAMES))
        and not (not wanted and label.casefold().startswith(("non", "not")))
    ]
    if not counting:
        raise ModelError(
            f"none of its labels is meant: {', '.join(known)}",
            where=f"{where}.labels",
            fix="Name the labels that count: toxicity: {model: ..., labels: [...]}",
        )

    def judge(batch: Sequence[str]) -> list[float]:
        return [max(s["score"] for s in scores if s["label"] in counting) for scores in classify(list(batch))]

    return judge
