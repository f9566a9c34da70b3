"""`data.clean.conflicts` and `data.clean.labels`: prompts that are answered differently, and labels that look wrong."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.minhash import normalised
from tunesmith.data.clean.step import Around, Step, Verdict, need
from tunesmith.data.clean.texts import text_of
from tunesmith.data.groups import DIGEST, digest, equal, same
from tunesmith.data.shelf import in_chunks


class Conflicts(Step):
    """Find rows that ask the same and are answered differently."""

    short: ClassVar[str] = "action"

    action: Literal["report", "drop", "majority"] = "report"
    """report: list them for a person; drop: leave all of them out; majority: keep those with the most frequent answer,
    and none where two are as frequent."""

    def apply(self, rows: Sequence[Conversation], around: Around) -> Iterator[Verdict | None]:
        told = zip(*around.engine.map(_hashed, in_chunks(rows), len(rows)), strict=True)
        asked, answers = (np.frombuffer(b"".join(digests), dtype=DIGEST) for digests in told)
        other, kept = np.full(len(rows), -1, dtype=np.int64), np.zeros(len(rows), dtype=bool)
        leaders = same(asked)
        places, sizes = equal(leaders)
        for group in np.split(places, np.cumsum(sizes)[:-1]):
            said = answers[group].tolist()
            counted = Counter(said)
            if len(counted) < 2:
                continue
            (first, most), (_, second) = counted.most_common(2)
            others = {answer: next(i for i, a in zip(group, said, strict=True) if a != answer) for answer in counted}
            other[group] = [others[answer] for answer in said]
            if self.action == "majority" and most > second:
                kept[group] = [answer == first for answer in said]
        for i, j in enumerate(other.tolist()):
            if j < 0 or kept[i]:
                yield None
                continue
            why = f"asks the same as {rows[j].id} and is answered differently"
            yield Verdict(rows[i] if self.action == "report" else None, why, {"conflict": 1})


def _hashed(rows: Sequence[Conversation]) -> tuple[bytes, bytes]:
    """Digests of each row's prompt (zero where it says nothing) and answer."""
    asked = [normalised(text_of(row, "prompt")) for row in rows]
    prompts = b"".join(digest(words) if words else bytes(DIGEST.itemsize) for words in asked)
    return prompts, b"".join(digest(normalised(row.answer)) for row in rows)


class Labels(Step):
    """Find labels that look wrong (cleanlab's confident learning, Northcutt et al. 2021): a simple classifier learns
    them from the prompts' words, each row judged by one that has not seen it. For rows whose answers are labels."""

    short: ClassVar[str] = "action"

    action: Literal["report", "drop"] = "report"
    """List such rows for a person, or leave them out."""
    folds: int = Field(5, ge=2)
    """How many classifiers are trained, each on the other folds."""

    def apply(self, rows: Sequence[Conversation], around: Around) -> Iterable[Verdict | None]:
        rank = need("cleanlab.filter", "labels").find_label_issues
        verdicts: list[Verdict | None] = [None] * len(rows)
        answers = [row.answer.strip() for row in rows]
        counted = Counter(answers)
        # A label that some fold would not see can't be judged; nor can answers that are no labels.
        judged = [i for i, answer in enumerate(answers) if counted[answer] >= self.folds and len(answer) <= 80]
        names = sorted({answers[i] for i in judged})
        if len(names) < 2:
            return verdicts
        given = np.array([names.index(answers[i]) for i in judged])
        probabilities = self._held_out([text_of(rows[i], "prompt") for i in judged], given, around.seed)
        for place in rank(given, probabilities, return_indices_ranked_by="self_confidence", n_jobs=1):
            i, likely = judged[place], int(probabilities[place].argmax())
            why = f"labelled '{answers[i]}', looks like '{names[likely]}' (p = {probabilities[place][likely]:.2f})"
            verdicts[i] = Verdict(rows[i] if self.action == "report" else None, why, {answers[i]: 1})
        return verdicts

    def _held_out(self, texts: Sequence[str], labels: Any, seed: int) -> Any:
        """Each row's probability of each label, by a classifier that has not seen the row: shape (rows, labels)."""
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedKFold, cross_val_predict
        from sklearn.pipeline import make_pipeline

        classifier = make_pipeline(TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2)), LogisticRegression(C=10))
        folds = StratifiedKFold(self.folds, shuffle=True, random_state=seed)
        return cross_val_predict(classifier, list(texts), labels, cv=folds, method="predict_proba")
