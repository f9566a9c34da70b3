"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306): learning from single answers that
somebody found good or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from tunesmith.conversation.message import Conversation, Rated
from tunesmith.conversation.render import Renderer
from tunesmith.train.objectives.method import Batch, Example, Loss, Method, log_probs

if TYPE_CHECKING:
    from tunesmith.models.packed import PackedForward
    from tunesmith.models.packs import Pack


class Kto(Method):
    """Raise good answers and lower bad ones, measured from where the model started and from how far it has moved on
    answers that do not belong to their prompts (each with the answer of the last row before it that has another)."""

    takes = "rated"

    kind: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0)
    """How strongly scores count: the reward is beta times the log-probability's gain."""
    good_weight: float = Field(1.0, gt=0)
    """Weight of good answers; the paper keeps weight times count of both kinds within 4:3 of each other."""
    bad_weight: float = Field(1.0, gt=0)
    """Weight of bad answers."""

    @property
    def compares(self) -> bool:
        return True

    @property
    def figures(self) -> dict[str, bool]:
        return {"rewards_good": True, "rewards_bad": False, "kl": False}

    def encode(self, rows: Sequence[Conversation], renderer: Renderer, max_length: int) -> Iterator[list[Example]]:
        for row, other in _with_strangers(rows):
            assert isinstance(row, Rated)
            own = renderer.render(_only_the_answer(row))
            answer = other.messages[-1]
            strange = renderer.render(_only_the_answer(replace(row, messages=(*row.messages[:-1], answer))))
            strange = type(strange)(strange.ids[:max_length], strange.weights[:max_length])
            yield [Example(row.id, (own,), (strange,), float(row.good))]

    def sizes(self, example: Example) -> dict[str, float]:
        return {"rows": 1.0}

    def look(self, forward: PackedForward, packs: Iterator[tuple[Sequence[Example], Pack]]) -> Any:
        """By how much the log-probabilities of strange answers have grown: the KL divergence's estimate, in nats."""
        total, count = 0.0, 0
        for examples, pack in packs:
            now = log_probs(forward, pack)
            total += sum(x.sum().item() - e.reference[1] for x, e in zip(now, examples, strict=True))
            count += len(examples)
        return max(total / count, 0.0)

    def loss(self, forward: PackedForward, batch: Batch) -> Loss:
        import torch

        now_R = torch.stack([x.sum() for x in log_probs(forward, batch.pack)])
        gain_R = now_R - now_R.new_tensor([e.reference[0] for e in batch.examples])
        good_R = now_R.new_tensor([e.target for e in batch.examples]) > 0
        away_R = self.beta * torch.where(good_R, gain_R - batch.context, batch.context - gain_R)
        weight_R = torch.where(good_R, self.good_weight, self.bad_weight)
        with torch.no_grad():
            told: dict[str, tuple[float, float]] = {
                name: (self.beta * gain_R[kind_R].sum().item(), int(kind_R.sum()))
                for name, kind_R in (("rewards_good", good_R), ("rewards_bad", ~good_R))
            }
        told["kl"] = (batch.context * len(good_R), len(good_R))
        return Loss({"rows": (weight_R * (1 - away_R.sigmoid())).sum()}, told)


def _with_strangers(rows: Sequence[Conversation]) -> Iterator[tuple[Conversation, Conversation]]:
    """Each row with the last one before it (before the first row come the last ones) that has another prompt; with the
    row before it where all have the same."""
    if not rows:
        return
    before = rows[-1]
    other = next((row for row in reversed(rows) if row.prompt != rows[0].prompt), before)
    for row in rows:
        if before.prompt != row.prompt or other.prompt == row.prompt:
            other = before
        yield row, other
        before = row


def _only_the_answer(row: Rated) -> Conversation:
    """The row with loss on its last turn alone."""
    *before, last = row.messages
    return Conversation((*(replace(m, weight=0.0) for m in before), last), row.id, row.metadata, row.tools)
