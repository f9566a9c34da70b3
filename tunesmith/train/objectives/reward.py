"""Learning one score of an answer from pairs: a head on the model instead of its language."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Renderer
from tunesmith.train.objectives.method import Batch, Example, Loss, Method, to_score

if TYPE_CHECKING:
    from tunesmith.models.packed import PackedForward


class Reward(Method):
    """Learn a score from pairs, so that the better ending's is the higher (Bradley and Terry 1952), where a row says so
    by its margin."""

    takes = "preference"
    head = "reward"

    kind: Literal["reward"] = "reward"
    center: float = 0.0
    """Weight of the squared sum of a pair's scores, which keeps them around zero (Eisenstein et al. 2023, arXiv
    2312.09244)."""

    @property
    def figures(self) -> dict[str, bool]:
        return {"rewards_accuracy": True, "rewards_margin": True}

    def encode(self, rows: Sequence[Conversation], renderer: Renderer, max_length: int) -> Iterator[list[Example]]:
        for row in rows:
            sequences = tuple(to_score(renderer.render(conversation).ids) for conversation in row.conversations)
            yield [Example(row.id, sequences, target=getattr(row, "margin", None) or 0.0)]

    def classes(self, examples: Sequence[Example]) -> list[str]:
        return ["reward"]

    def sizes(self, example: Example) -> dict[str, float]:
        return {"pairs": 1.0}

    def loss(self, forward: PackedForward, batch: Batch) -> Loss:
        import torch.nn.functional as F

        chosen_P, rejected_P = forward.scores(batch.pack)[:, 0].view(-1, 2).unbind(1)
        margin_P = chosen_P.new_tensor([e.target for e in batch.examples])
        losses_P = -F.logsigmoid(chosen_P - rejected_P - margin_P) + self.center * (chosen_P + rejected_P) ** 2
        told: dict[str, Any] = {
            "rewards_accuracy": (chosen_P > rejected_P).float(),
            "rewards_margin": (chosen_P - rejected_P).detach(),
        }
        return Loss({"pairs": losses_P.sum()}, {k: (v.sum().item(), len(v)) for k, v in told.items()})
