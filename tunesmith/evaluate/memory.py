"""Overfitting and memory: is the model better on rows that it has seen, and does it recite them?"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.conversation.message import Conversation, Message
from tunesmith.evaluate.metrics.base import Floats, mean, measured, rows
from tunesmith.evaluate.statistics import compared
from tunesmith.inference.kept import Kept
from tunesmith.intervals import Resamples, bootstrap, pulls
from tunesmith.progress import bar

SHORTEST, CONTINUED = 16, 32  # tokens: of an answer that can be recited; of what is compared
CANDIDATES = 255  # that a canary's secret is ranked among


VERBATIM = measured("verbatim", mean, higher_is_better=False, binary=True)
GAP = measured("gap", mean, higher_is_better=False)


class Memory:
    """The probe: loss on rows that were trained on against rows that were not, verbatim continuations of training
    rows, and the exposure of canaries.

    Args:
        train, unseen: rows of each kind, at most `count` of each drawn by seed.
    """

    name = "memory"

    def __init__(
        self, train: Sequence[Conversation], unseen: Sequence[Conversation], count: int, bootstrap: int, seed: int
    ) -> None:
        random = np.random.default_rng(seed)
        self.canaries = list({row.answer: row for row in train if row.metadata.get("canary")}.values())
        plain = [row for row in train if row.messages and not row.metadata.get("canary")]
        other = [row for row in unseen if row.messages]
        self.train = [plain[i] for i in random.permutation(len(plain))[:count]]
        said = Counter(row.answer for row in plain)  # what many rows answer, such as a label, is the task, not a memory
        self.own = [row for row in self.train if said[row.answer] == 1]
        self.unseen = [other[i] for i in random.permutation(len(other))[:count]]
        self.bootstrap, self.seed = bootstrap, seed

    def ask(self, subject: Kept, side: str, baseline: Any) -> Any:
        with bar(f"Seen and unseen rows, {side}", len(self.train) + len(self.unseen)) as progress:
            scores = subject.likelihoods([*self.train, *self.unseen], progress.advance)
        losses = [s.nll / max(s.tokens, 1) for s in scores]
        with bar(f"Recited rows, {side}", len(self.own)) as progress:
            recited = subject.recited(self.own, SHORTEST, CONTINUED, progress.advance)
        found: dict[str, Any] = {
            "seen": losses[: len(self.train)],
            "unseen": losses[len(self.train) :],
            "recited": [r for r in recited if r is not None],
        }
        if self.canaries:
            found["exposure"] = [self._exposure(subject, row) for row in self.canaries]
        return found

    def _exposure(self, subject: Kept, row: Conversation) -> float:
        """log2 of the candidates less log2 of the secret's rank among them, in bits (Carlini et al. 2019, 4.2)."""
        secret = str(row.metadata["canary"])
        random = np.random.default_rng([self.seed, int(secret)])
        others = ["".join(map(str, random.integers(0, 10, len(secret)))) for _ in range(CANDIDATES)]
        made = [
            Conversation((*row.prompt, Message("assistant", row.answer.replace(secret, other))))
            for other in (secret, *others)
        ]
        scores = subject.likelihoods(made, lambda _: None)
        rank = 1 + sum(s.nll < scores[0].nll for s in scores[1:])
        return math.log2(len(made)) - math.log2(rank)

    def compare(self, found: dict[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {"gap": self._gap(found)}
        if found["tuned"]["recited"]:
            stats = {side: rows([float(r) for r in f["recited"]]) for side, f in found.items()}
            told["verbatim"] = compared(VERBATIM, stats, self.bootstrap, self.seed)
        if self.canaries:
            stats = {side: rows(f["exposure"]) for side, f in found.items()}
            told["exposure"] = compared(
                measured("exposure", mean, higher_is_better=False), stats, self.bootstrap, self.seed
            )
        return {self.name: told}

    def _gap(self, found: dict[str, Any]) -> dict[str, Any]:
        """Loss on unseen rows less loss on seen ones, in nats a token; the two sets are resampled apart."""
        told: dict[str, Any] = {"n": len(self.train) + len(self.unseen), "higher_is_better": False}
        losses = {side: (np.asarray(f["unseen"]), np.asarray(f["seen"])) for side, f in found.items()}
        for side, (unseen, seen) in losses.items():
            told[side] = self._span(unseen, seen)
        (unseen, seen), (unseen_before, seen_before) = losses["tuned"], losses["baseline"]
        told["difference"] = self._span(unseen - unseen_before, seen - seen_before)
        return told

    def _span(self, one: Floats, other: Floats) -> dict[str, float]:
        """The mean of one set less that of the other."""
        sets = [rows(one.tolist()), rows((-other).tolist())]
        value = float(np.mean(one) - np.mean(other))
        spread = sum(mean(Resamples(len(x), self.bootstrap, self.seed + i).sums(x)) for i, x in enumerate(sets))
        pulled = np.concatenate([pulls(mean, x) for x in sets])
        return {"value": value} | bootstrap(value, np.asarray(spread), pulled, min(map(len, sets)))
