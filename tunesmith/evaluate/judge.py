"""A model as judge: which answer is better, how good each one is, and what of it the prompt supports.

What can't be judged (the endpoint failed on every try, or the judgement can't be read) is no difference between the
two models, and is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.agreement import kappa
from tunesmith.conversation.message import Conversation
from tunesmith.evaluate.asking import Duel, duel_asks, question_of, read, rubric_ask, sentences, support_ask
from tunesmith.evaluate.chat import Chat
from tunesmith.evaluate.human import HumanDuel, HumanScore, human_labels
from tunesmith.evaluate.metrics.base import mean, measured, rows
from tunesmith.evaluate.section import JudgeSection
from tunesmith.evaluate.statistics import compared, preference
from tunesmith.inference.engine import Sampling
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Ask
from tunesmith.intervals import Resamples, share
from tunesmith.progress import bar

SIDES = ("baseline", "tuned")
SCORE = measured("score", mean)
WORTH = {"baseline": 0.0, "tie": 0.5, "tuned": 1.0}


class Judge:
    """The probe.

    Args:
        judge: the model that judges; opened once both others have answered.
        sampling: how the answers to the test rows were drawn; greedy if None.
    """

    name = "judge"

    def __init__(
        self,
        section: JudgeSection,
        judge: Kept,
        test: Sequence[Conversation],
        limit: int,
        sampling: Sampling | None,
        folder: Path,
        bootstrap: int,
        seed: int,
    ) -> None:
        self.section, self.judge, self.limit, self.sampling = section, judge, limit, sampling
        self.bootstrap, self.seed = bootstrap, seed
        asking = [row for row in test if row.prompt]
        picked = np.random.default_rng(seed).permutation(len(asking))[: section.rows or len(asking)]
        self.rows = [asking[i] for i in sorted(picked)]
        self.human = human_labels(section.human, folder) if section.human else None
        self.chats: Sequence[Chat] = ()
        self.failures: Counter[str] = Counter()
        self.calls = self.prompt_tokens = self.completion_tokens = 0

    def ask(self, subject: Kept, side: str, baseline: Any) -> Any:
        asks = list(map(Ask.of, self.rows))
        given = [r.text for r in subject.replies(asks, self.limit, lambda _: None, self.sampling)]
        return {"rows": given, "chats": [chat.answers(subject) for chat in self.chats]}

    def compare(self, found: dict[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {"model": self.judge.name}
        references = [row.answer if self.section.reference else None for row in self.rows]
        questions = [question_of(row.prompt) for row in self.rows]
        lines: list[dict[str, Any]] = [
            {"id": row.id, "kind": "judged", "prompt": question} | {side: found[side]["rows"][i] for side in SIDES}
            for i, (row, question) in enumerate(zip(self.rows, questions, strict=True))
        ]
        if "pairwise" in self.section.ways:
            duels = list(map(Duel, questions, references, found["baseline"]["rows"], found["tuned"]["rows"]))
            self._pairwise(self.duels(duels, "Judging pairs"), lines, told)
        if "rubric" in self.section.ways:
            self._rubric(questions, references, found, lines, told)
        if "support" in self.section.ways:
            self._support(found, told)
        self._chats(found, told)
        if self.human:
            told["agreement"] = self._agreement()
        told["failures"] = dict(self.failures)
        told["usage"] = {
            "calls": self.calls, "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
            "cost": round(self.section.price.cost(self.prompt_tokens, self.completion_tokens), 6),
        }  # fmt: skip
        told["examples"] = lines
        self.judge.close()
        return {self.name: told}

    def duels(self, duels: Sequence[Duel], title: str) -> list[tuple[str, bool | None, list[str]]]:
        """Of each pair: who won (baseline, tuned or tie), whether the order changed that (None where it was not asked
        in both), and the reasons. Only who wins in both orders wins; equal answers are a tie that needs no judge."""
        places = [i for i, duel in enumerate(duels) if duel.baseline.strip() != duel.tuned.strip()]
        asks = [ask for i in places for ask in duel_asks(duels[i], self.section.criteria)]
        verdicts = self._asked(asks, "verdict", {"a": "A", "b": "B", "tie": "tie"}, title)
        found: list[tuple[str, bool | None, list[str]]] = [("tie", None, ["the same answer"])] * len(duels)
        for n, i in enumerate(places):
            (first, why), (second, why_again) = verdicts[2 * n : 2 * n + 2]
            one = {"A": "baseline", "B": "tuned", "tie": "tie", None: None}[first]
            other = {"A": "tuned", "B": "baseline", "tie": "tie", None: None}[second]
            asked_both = None not in (one, other)
            found[i] = (one if asked_both and one == other else "tie") or "tie", None, [why, why_again]
            if asked_both:
                found[i] = found[i][0], one != other, found[i][2]
        return found

    def _pairwise(
        self, judged: list[tuple[str, bool | None, list[str]]], lines: list[dict[str, Any]], told: dict[str, Any]
    ) -> None:
        draws = Resamples(len(judged), self.bootstrap, self.seed)
        told["preference"] = preference([WORTH[winner] for winner, _, _ in judged], draws)
        told["preference"] |= {"n": len(judged), "higher_is_better": True}
        for name, wanted in (("won", "tuned"), ("tied", "tie"), ("lost", "baseline")):
            told[name] = self._share([float(winner == wanted) for winner, _, _ in judged], good=wanted != "baseline")
        moved = [float(changed) for _, changed, _ in judged if changed is not None]
        if moved:
            told["changed_by_order"] = self._share(moved, good=False)
        for line, (winner, _, reasons) in zip(lines, judged, strict=True):
            line |= {"winner": winner, "reasons": reasons}

    def _rubric(
        self,
        questions: Sequence[str],
        references: Sequence[str | None],
        found: dict[str, Any],
        lines: list[dict[str, Any]],
        told: dict[str, Any],
    ) -> None:
        scores = self._scored({s: list(zip(questions, references, found[s]["rows"], strict=True)) for s in SIDES})
        for i, line in enumerate(lines):
            given = {side: scores[side][i] for side in SIDES}
            line["scores"] = {side: {"score": score, "reason": why} for side, (score, why) in given.items()}
        stats = {side: rows([float(score) for score, _ in scores[side]]) for side in SIDES}
        told["score"] = compared(SCORE, stats, self.bootstrap, self.seed)

    def _chats(self, found: dict[str, Any], told: dict[str, Any]) -> None:
        for place, chat in enumerate(self.chats):
            scores = self._scored({side: chat.asked(found[side]["chats"][place]) for side in SIDES})
            by_talk = {side: chat.by_talk([score for score, _ in scores[side]]) for side in SIDES}
            stats = {side: rows(values) for side, values in by_talk.items()}
            told[chat.suite.name] = {"score": compared(SCORE, stats, self.bootstrap, self.seed)}

    def _scored(self, asked: dict[str, list[tuple[str, str | None, str]]]) -> dict[str, list[tuple[int, str]]]:
        """Both sides' scores with reasons; where one has none, both have the worst."""
        given = {side: self.scores(parts, f"Scoring answers, {side}") for side, parts in asked.items()}
        lost = {i for scores in given.values() for i, (score, _) in enumerate(scores) if score is None}
        return {
            side: [(1 if i in lost or score is None else score, why) for i, (score, why) in enumerate(scores)]
            for side, scores in given.items()
        }

    def scores(self, asked: Sequence[tuple[str, str | None, str]], title: str) -> list[tuple[int | None, str]]:
        """A score and a reason for each (question, reference, answer); None where there is none."""
        known = {str(n): n for n in range(1, self.section.scale + 1)}
        asks = [rubric_ask(*parts, self.section.criteria, self.section.scale) for parts in asked]
        return self._asked(asks, "score", known, title)

    def _support(self, found: dict[str, Any], told: dict[str, Any]) -> None:
        stats = {}
        for side in SIDES:
            claims = [sentences(answer) for answer in found[side]["rows"]]
            premises = [question_of([m for m in row.prompt if m.role != "system"]) for row in self.rows]
            asks = [support_ask(p, claim) for p, of_row in zip(premises, claims, strict=True) for claim in of_row]
            judged = iter(
                self._asked(
                    asks, "supported", {"yes": 1.0, "true": 1.0, "no": 0.0, "false": 0.0}, f"Judging support, {side}"
                )
            )
            shares = [[next(judged)[0] or 0.0 for _ in of_row] for of_row in claims]
            stats[side] = rows([float(np.mean(share)) if share else 0.0 for share in shares])
        told["supported"] = compared(measured("supported", mean), stats, self.bootstrap, self.seed)

    def _agreement(self) -> dict[str, Any]:
        """How far the judge says what people said of the same answers."""
        duels = [h for h in self.human or () if isinstance(h, HumanDuel)]
        if duels:
            people = [{"a": "baseline", "b": "tuned", "tie": "tie"}[h.winner] for h in duels]
            given = [winner for winner, _, _ in self.duels([h.duel for h in duels], "Judging as people did")]
            same = [float(a == b) for a, b in zip(people, given, strict=True)]
            found = {"kappa": kappa(people, given, list(WORTH), seed=self.seed), "same": self._share(same)}
        else:
            labels = [str(n) for n in range(1, self.section.scale + 1)]
            scored = [h for h in self.human or () if isinstance(h, HumanScore)]
            asked = [(h.question, None, h.answer) for h in scored]
            judged = [str(score or 1) for score, _ in self.scores(asked, "Scoring as people did")]
            people = [str(min(max(round(h.score), 1), self.section.scale)) for h in scored]
            same = [float(a == b) for a, b in zip(people, judged, strict=True)]
            found = {"kappa": kappa(people, judged, labels, True, self.seed), "same": self._share(same)}
        return {name: score for name, score in found.items() if score is not None}

    def _share(self, values: Sequence[float], good: bool = True) -> dict[str, Any]:
        found = {"value": sum(values) / len(values)} | share(round(sum(values)), len(values))
        return found | {"n": len(values), "higher_is_better": good}

    def _asked(self, asks: Sequence[Ask], key: str, known: dict[str, Any], title: str) -> list[tuple[Any, str]]:
        """What the judge says under `key`, as one of the values of `known`, and why; None where that is not known."""
        with bar(title, len(asks)) as progress:
            replies = self.judge.replies(asks, self.section.max_new_tokens, progress.advance)
        found = []
        for reply in replies:
            self.calls += 1
            self.prompt_tokens += reply.read
            self.completion_tokens += reply.tokens
            verdict, reason = read(reply.text, key, known)
            if verdict is None:
                self.failures[reply.failure or "a judgement that can't be read"] += 1
            found.append((verdict, reason))
        return found
