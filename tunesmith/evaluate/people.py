"""What people prefer: their judgements of pairs of answers, made into strengths (Bradley-Terry), with intervals, and
how far they agree. A row is the unit, however many people judged it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.agreement import alpha, kappa
from tunesmith.evaluate.statistics import preference
from tunesmith.intervals import Floats, Resamples, of_sums
from tunesmith.runs import hash_json, read_json, read_jsonl

KEY, JUDGEMENTS = "key.json", "judgements.jsonl"
TIE = "tie"
SHARED_AT_LEAST = 5  # items that two people must share for a kappa of theirs
STEPS, CLOSE = 1000, 1e-10


@dataclass(frozen=True)
class Pair:
    """Two models' answers to a row, and what each reviewer said: the better model's name, or `tie`."""

    row: str
    one: str
    other: str
    said: Mapping[str, str]

    @property
    def worth(self) -> float:
        """How much of a win it is for `one`: 0 to 1, over all who judged it."""
        return float(np.mean([{self.one: 1.0, self.other: 0.0}.get(winner, 0.5) for winner in self.said.values()]))


def item_of(prompt: Any, answers: Mapping[str, str]) -> str:
    """A pair's name: it changes with the prompt, the models and their answers, so old judgements never fit new ones."""
    return hash_json([prompt, dict(answers)])[:16]


def strengths(wins: Floats, k: int) -> Floats:
    """Log-strengths [..., k] of k models, the first one's 0, from wins [..., k * k] of row model over column model
    (Bradley and Terry 1952; the MM steps of Hunter 2004, section 3). A tie is half a win for each; half a win is added
    each way to every pair that met, so that nothing is infinite."""
    won = wins.reshape(*wins.shape[:-1], k, k)
    met = won + np.swapaxes(won, -1, -2)
    won = won + 0.5 * (met > 0)
    met = met + (met > 0)
    p = np.ones(won.shape[:-1])
    for _ in range(STEPS):
        new = won.sum(-1) / (met / (p[..., :, None] + p[..., None, :])).sum(-1)
        new /= np.exp(np.log(new).mean(-1, keepdims=True))
        moved, p = np.nanmax(np.abs(np.log(new / p))), new
        if moved < CLOSE:
            break
    return np.asarray(np.log(p / p[..., :1]))


def summed_up(pairs: Sequence[Pair], models: Sequence[str], count: int = 2000, seed: int = 7) -> dict[str, Any]:
    """What the judgements come to, as scorecards hold it.

    Args:
        pairs: judged by at least one person, or of equal answers (said by nobody: a tie).
    """
    k, place = len(models), {model: i for i, model in enumerate(models)}
    by_row: dict[str, Floats] = {}
    for pair in pairs:
        worth = pair.worth if pair.said else 0.5
        wins = by_row.setdefault(pair.row, np.zeros((k, k)))
        wins[place[pair.one], place[pair.other]] += worth
        wins[place[pair.other], place[pair.one]] += 1 - worth
    stats = np.array([wins.ravel() for wins in by_row.values()])
    draws = Resamples(len(stats), count, seed)
    told: dict[str, Any] = {
        "judgements": sum(len(pair.said) for pair in pairs),
        "reviewers": dict(Counter(who for pair in pairs for who in pair.said)),
        "same_answers": sum(not pair.said for pair in pairs),
    }
    if k == 2:
        told["preference"] = preference(stats[:, 2].tolist(), draws)
        told["preference"] |= {"n": len(stats), "higher_is_better": True}
    told["strength"] = {}
    for i, model in enumerate(models[1:], 1):
        told["strength"][model] = of_sums(partial(_strength, i, k), stats, draws)
        told["strength"][model] |= {"n": len(stats), "higher_is_better": True}
    told["agreement"] = _agreement([pair for pair in pairs if pair.said], seed)
    return told


def _strength(place: int, k: int, wins: Floats) -> Floats:
    return np.asarray(strengths(wins, k)[..., place])


def _agreement(pairs: Sequence[Pair], seed: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    whole = alpha([list(pair.said.values()) for pair in pairs], seed)
    if whole is not None:
        found["alpha"] = whole
    labels = sorted({winner for pair in pairs for winner in pair.said.values()})
    for one, other in itertools.combinations(sorted({who for pair in pairs for who in pair.said}), 2):
        both = [(pair.said[one], pair.said[other]) for pair in pairs if {one, other} <= set(pair.said)]
        if len(both) >= SHARED_AT_LEAST:
            score = kappa([a for a, _ in both], [b for _, b in both], labels, seed=seed)
            if score is not None:
                found[f"kappa of {one} and {other}"] = score
    return found


def reviewed(folder: Path, lines: Sequence[Mapping[str, Any]], judge: Path | None = None) -> dict[str, Any] | None:
    """What people said of the answers of an evaluation; None where nobody has judged them.

    Args:
        folder: of the review. Judgements of other answers than these are left out.
        lines: of answers.jsonl.
        judge: what a model judged of the same rows (judge.jsonl), to tell how far it agrees with people.
    """
    if not (folder / JUDGEMENTS).is_file():
        return None
    sides = ("baseline", "tuned")
    now = {item_of(line["prompt"], {side: line[side]["answer"] for side in sides}) for line in lines}
    pairs = [pair for item, pair in judged_pairs(folder).items() if item in now]
    if not any(pair.said for pair in pairs):
        return None
    told = summed_up(pairs, sides)
    judged = read_jsonl(judge) if judge else []
    said = {line["id"]: line["winner"] for line in judged if "winner" in line}
    shared = [(winner, said[pair.row]) for pair in pairs if pair.row in said for winner in pair.said.values()]
    if shared:
        score = kappa([a for a, _ in shared], [b for _, b in shared], [*sides, TIE])
        told["agreement"] |= {"kappa of people and the judge": score} if score else {}
    return told


def judged_pairs(folder: Path) -> dict[str, Pair]:
    """Pairs of a review that somebody judged, and those of equal answers, by item."""
    said: dict[str, dict[str, str]] = {}
    for line in read_jsonl(folder / JUDGEMENTS):
        said.setdefault(line["item"], {})[line["reviewer"]] = line["winner"]
    key = read_json(folder / KEY)["items"]
    return {
        item: Pair(told["row"], told["a"], told["b"], said.get(item, {}))
        for item, told in key.items()
        if item in said or told["same"]
    }
