"""Learning one score a class from labelled rows: a head on the model instead of its language."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Renderer
from tunesmith.errors import DataError
from tunesmith.train.objectives.method import Batch, Example, Loss, Method, to_score

if TYPE_CHECKING:
    from tunesmith.models.packed import PackedForward


class Classify(Method):
    """Learn which answer (a class) belongs to a prompt, by the cross-entropy over the classes of the training rows."""

    head = "classes"

    kind: Literal["classify"] = "classify"
    weights: Literal["none", "balanced"] | dict[str, float] = "none"
    """Weight of each class's rows: none, balanced (rows / (classes * rows of the class), as scikit-learn has it), or by
    name."""

    @property
    def figures(self) -> dict[str, bool]:
        return {"accuracy": True}

    def encode(self, rows: Sequence[Conversation], renderer: Renderer, max_length: int) -> Iterator[list[Example]]:
        for row in rows:
            ids = renderer.prompt(row.prompt, row.tools)
            yield [Example(row.id, (to_score(ids),), target=row.answer.strip())]

    def classes(self, examples: Sequence[Example]) -> list[str]:
        found = sorted({str(example.target) for example in examples})
        if len(found) < 2:
            raise DataError(
                f"there is only one class: {found[0]!r}",
                where="data.sources",
                fix="Give rows of at least two classes: their answers are the classes.",
            )
        unknown = sorted(set(self.weights) - set(found)) if isinstance(self.weights, dict) else []
        if unknown:
            raise DataError(
                f"no row is of class {unknown[0]!r}",
                where="train.method.weights",
                fix=f"Classes: {', '.join(found[:20])}.",
            )
        return found

    def start(self, examples: Sequence[Example]) -> dict[str, float]:
        """The weight of each class."""
        counts = Counter(str(example.target) for example in examples)
        if isinstance(self.weights, dict):
            return {name: self.weights.get(name, 1.0) for name in counts}
        if self.weights == "balanced":
            return {name: len(examples) / (len(counts) * count) for name, count in counts.items()}
        return dict.fromkeys(counts, 1.0)

    def sizes(self, example: Example) -> dict[str, float]:
        return {"rows": 1.0}

    def loss(self, forward: PackedForward, batch: Batch) -> Loss:
        import torch.nn.functional as F

        scores_RK = forward.scores(batch.pack)
        number = forward.model.config.label2id
        unseen = next((e for e in batch.examples if e.target not in number), None)
        if unseen is not None:
            raise DataError(
                f"is of class {unseen.target!r}, which no training row has",
                where=unseen.row,
                fix="Give training rows of it, or leave it out.",
            )
        targets_R = scores_RK.new_tensor([number[e.target] for e in batch.examples]).long()
        weights_R = scores_RK.new_tensor([batch.known[e.target] for e in batch.examples])
        losses_R = weights_R * F.cross_entropy(scores_RK, targets_R, reduction="none")
        right = (scores_RK.argmax(-1) == targets_R).float().sum().item()
        return Loss({"rows": losses_R.sum()}, {"accuracy": (right, len(targets_R))})
