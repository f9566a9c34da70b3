"""What tuning took away: the base's own behaviour on general prompts, kept as reference.

The base answers about 200 general prompts. Then: how far the tuned model's next-token distributions are from the
base's along those answers (KL), how likely it finds them, and how much its own answers changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from tunesmith.conversation.message import Conversation, Message
from tunesmith.evaluate.metrics.base import Floats, mean, measured, rows
from tunesmith.evaluate.prompts import prompts
from tunesmith.evaluate.statistics import compared, interval
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Ask
from tunesmith.intervals import Resamples
from tunesmith.progress import bar

LIKELIEST = 20  # tokens whose probability is compared; all others count as one


KL = measured("kl", mean, higher_is_better=False)
CHANGED = measured("changed", mean, higher_is_better=False, binary=True)
OVERLAP = measured("overlap", mean)
PERPLEXITY = measured("perplexity", lambda sums: np.exp(mean(sums)), higher_is_better=False)


def divergence(base: Floats, tuned: Floats) -> Floats:
    """KL(base || tuned) [N] in nats from log-probabilities [N, k] of the base's k likeliest tokens, all others taken
    as one: a lower bound of the whole divergence (data processing inequality)."""
    p, q = np.exp(base), np.exp(tuned)
    rest_p, rest_q = np.clip(1 - p.sum(-1), 1e-9, 1), np.clip(1 - q.sum(-1), 1e-9, 1)
    found = (p * (base - tuned)).sum(-1) + rest_p * np.log(rest_p / rest_q)
    return np.asarray(np.maximum(found, 0.0))


class Forgetting:
    """The probe.

    Args:
        count: how many of the prompts, evenly over their kinds; all if None.
        limit: longest answer in tokens.
    """

    name = "forgetting"

    def __init__(self, count: int | None, limit: int, bootstrap: int, seed: int) -> None:
        every = prompts("general")
        step = len(every) / min(count or len(every), len(every))
        taken = [every[int(i * step)] for i in range(min(count or len(every), len(every)))]
        self.kinds, self.texts = [k for k, _ in taken], [t for _, t in taken]
        self.limit, self.bootstrap, self.seed = limit, bootstrap, seed

    def ask(self, subject: Kept, side: str, baseline: Any) -> Any:
        asks = [Ask.user(text) for text in self.texts]
        with bar(f"General prompts, {side}", len(asks)) as progress:
            given = [r.text for r in subject.replies(asks, self.limit, progress.advance)]
        reference = baseline["given"] if baseline else given
        found: dict[str, Any] = {"given": given}
        if subject.scores and (baseline is None or "nearest" in baseline):
            answered = [
                Conversation((*ask.messages, Message("assistant", text or " ")))
                for ask, text in zip(asks, reference, strict=True)
            ]
            with bar(f"Drift from the base, {side}", 2 * len(asks)) as progress:
                scores = subject.likelihoods(answered, progress.advance)
                at = [ids for ids, _ in baseline["nearest"]] if baseline else None
                found["nearest"] = subject.likeliest(answered, at, LIKELIEST, progress.advance)
            found["nll"] = [[s.nll, s.tokens] for s in scores]
        return found

    def compare(self, found: dict[str, Any]) -> dict[str, Any]:
        base, tuned = found["baseline"], found["tuned"]
        draws = Resamples(len(self.texts), self.bootstrap, self.seed)
        n = {"n": len(self.texts), "higher_is_better": False}
        changed = [float(a != b) for a, b in zip(base["given"], tuned["given"], strict=True)]
        told: dict[str, Any] = {
            "changed": interval(CHANGED, rows(changed), draws) | n,
            "overlap": interval(OVERLAP, rows(_overlaps(base["given"], tuned["given"])), draws)
            | {"n": len(self.texts), "higher_is_better": True},
        }
        if "nearest" in tuned:
            pairs = zip(base["nearest"], tuned["nearest"], strict=True)
            drift = [divergence(np.asarray(one), np.asarray(other)) for (_, one), (_, other) in pairs]
            stats = np.array([[d.sum(), len(d)] for d in drift])
            told["kl"] = interval(KL, stats, draws) | n
            both = {side: np.asarray(f["nll"], dtype=float) for side, f in found.items()}
            told["perplexity"] = compared(PERPLEXITY, both, self.bootstrap, self.seed)
            told["by_kind"] = {
                kind: interval(KL, part, Resamples(len(part), 500, self.seed)) | {"n": len(part)}
                for kind in dict.fromkeys(self.kinds)
                for part in [stats[[i for i, k in enumerate(self.kinds) if k == kind]]]
            }
        told["examples"] = [
            {"kind": kind, "prompt": text, "baseline": one, "tuned": other}
            for kind, text, one, other in zip(self.kinds, self.texts, base["given"], tuned["given"], strict=True)
        ]
        return {self.name: told}


def _overlaps(one: Sequence[str], other: Sequence[str]) -> list[float]:
    """ROUGE-L F1 of each pair of answers; 1 where both are the same."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"])
    return [1.0 if a == b else scorer.score(a, b)["rougeL"].fmeasure for a, b in zip(one, other, strict=True)]
