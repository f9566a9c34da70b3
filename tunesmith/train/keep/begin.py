"""The recipe's terms against forgetting, as one thing for the loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tunesmith.conversation.message import Conversation, Text
from tunesmith.conversation.render import Rendered, Renderer
from tunesmith.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch

    from tunesmith.models.packed import PackedForward
    from tunesmith.train.section import TrainSection


class Keep:
    """All terms of `train.keep`, begun on a model that has taken no step.

    Attributes:
        figures: each term's value at the last step, as `keep_<kind>`.
    """

    def __init__(
        self, section: TrainSection, inputs: Any, forward: PackedForward, weights: Mapping[str, torch.nn.Parameter]
    ) -> None:
        self.figures: dict[str, float] = {}
        self.terms: dict[str, Any] = {}
        if not section.keep:
            return
        from tunesmith.train.keep.terms import Start

        if inputs.general and forward.model.get_output_embeddings() is None:
            raise ModelError(
                f"method {section.method.kind} puts another head on the model: ewc and kl have no answers to look at",
                where="train.keep",
                fix="Take l2.",
            )
        general = {path: _rendered(rows, inputs.renderer) for path, rows in inputs.general.items()}
        start = Start(forward, weights, general, inputs.seed, inputs.ranks)
        for number, term in enumerate(section.keep):
            again = [t.kind for t in section.keep[:number]].count(term.kind)
            self.terms[f"keep_{term.kind}" + (f"_{again + 1}" if again else "")] = term.begin(start)

    def add(self, step: int, shared: bool) -> None:
        """Add, at a step counted from 0, the gradient of the terms that ranks share out, or of the others; and note
        their values."""
        for name, term in self.terms.items():
            if term.shared is shared:
                self.figures[name] = term.add(step)


def _rendered(rows: Sequence[Conversation], renderer: Renderer) -> list[Rendered]:
    found = []
    for row in rows:
        if row.kind not in (Conversation.kind, Text.kind):
            raise DataError(
                f"ewc and kl look at conversations and texts, and this is a {row.kind} row",
                where=row.id,
                fix="Name a file of such rows in train.keep.",
            )
        rendered = renderer.render_text(row) if isinstance(row, Text) else renderer.render(row)
        if not rendered.trained:
            raise DataError("no token of this row is an answer", where=row.id, fix="Give rows with answers, or texts.")
        found.append(rendered)
    return found
