"""What is asked of both models besides the test rows. Each probe is a line in a recipe; without, it costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.evaluate.bias import Bias
from tunesmith.evaluate.chat import Chat
from tunesmith.evaluate.forgetting import Forgetting
from tunesmith.evaluate.judge import Judge
from tunesmith.evaluate.memory import Memory
from tunesmith.evaluate.metrics.base import Metric, mean, rows
from tunesmith.evaluate.safety import Safety
from tunesmith.evaluate.statistics import compared
from tunesmith.evaluate.suites import Suites, task_rows
from tunesmith.inference.engine import Sampling
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Ask
from tunesmith.intervals import between, quantile
from tunesmith.progress import bar, say

if TYPE_CHECKING:
    from tunesmith.evaluate.evaluate import EvaluateInputs
    from tunesmith.evaluate.section import EvaluateSection


class Probe(Protocol):
    """`ask` is called while a model is open, the baseline first; `compare` once both were asked."""

    @property
    def name(self) -> str: ...

    def ask(self, subject: Kept, side: str, baseline: Any) -> Any:
        """What the model showed; the tuned one is given what the baseline showed."""

    def compare(self, found: dict[str, Any]) -> dict[str, Any]:
        """What goes into the scorecard."""


def asked(section: EvaluateSection, inputs: EvaluateInputs, test: Sequence[Conversation], limit: int) -> list[Probe]:
    """The probes that a recipe asks for."""
    found: list[Probe] = []
    if section.alone:
        found.append(Alone(test[: section.alone], limit, section.bootstrap, inputs.seed))
    if section.forgetting:
        chosen = section.forgetting
        found.append(Forgetting(chosen.prompts, chosen.max_new_tokens, section.bootstrap, inputs.seed))
    if section.memory and not inputs.train:
        say("memory is not measured: only a run's own evaluation knows its training rows")
    if section.memory and inputs.train:
        unseen = [*inputs.validation, *test]
        found.append(Memory(inputs.train, unseen, section.memory.rows, section.bootstrap, inputs.seed))
    if section.safety:
        found.append(Safety(section.safety, test, limit, section.bootstrap, inputs.seed))
    if section.bias:
        found.append(Bias(section.bias, test, limit, inputs.folder, section.bootstrap, inputs.seed))
    chats = [suite for suite in section.suites if suite.kind == "chat"]
    if len(chats) < len(section.suites):
        plain = [suite for suite in section.suites if suite.kind != "chat"]
        found.append(Suites(plain, inputs.folder, limit, section.bootstrap, inputs.seed))
    if section.judge and inputs.judge:
        drawn = Sampling(section.heat, inputs.seed) if section.heat else None
        judge = Judge(section.judge, inputs.judge, test, limit, drawn, inputs.folder, section.bootstrap, inputs.seed)
        judge.chats = [Chat(suite, task_rows(suite, inputs.folder, inputs.seed)) for suite in chats]
        found.append(judge)
    return found


@dataclass(frozen=True)
class Alone:
    """Rows asked one at a time: how long an answer takes, and whether batching changed any."""

    rows: Sequence[Conversation]
    limit: int
    bootstrap: int
    seed: int
    name: str = "latency"

    def ask(self, subject: Kept, side: str, baseline: Any) -> Any:
        prompts = [Ask.of(row) for row in self.rows]
        with bar(f"One at a time, {side}", len(prompts)) as progress:
            alone = subject.alone(prompts, self.limit, progress.advance)
        together = subject.replies(prompts, self.limit, lambda _: None)
        return {
            "seconds": [r.seconds for r in alone if r.seconds is not None],
            "tokens": [r.tokens for r in alone if r.seconds is not None],
            "changed": [float(a.text != b.text) for a, b in zip(alone, together, strict=True)],
        }

    def compare(self, found: dict[str, Any]) -> dict[str, Any]:
        told: dict[str, Any] = {"n": len(self.rows), "unit": "seconds"}
        for name, share in (("p50", 0.5), ("p95", 0.95)):
            spans = {side: quantile(f["seconds"], share) for side, f in found.items()}
            told[name] = spans | {"difference": between(spans["tuned"], spans["baseline"]), "n": len(self.rows)}
        speed = Metric("tokens_per_second", lambda _: np.zeros((0, 2)), mean)
        stats = {side: np.array([f["tokens"], f["seconds"]], dtype=float).T for side, f in found.items()}
        told["tokens_per_second"] = compared(speed, stats, self.bootstrap, self.seed)
        changed = Metric("changed", lambda _: np.zeros((0, 2)), mean, higher_is_better=False, binary=True)
        moved = {side: rows(f["changed"]) for side, f in found.items()}
        told["changed_by_batching"] = compared(changed, moved, self.bootstrap, self.seed)
        return {self.name: told}
