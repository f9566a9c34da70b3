"""What the training loop works on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Renderer
from tunesmith.models.machine import Machine
from tunesmith.models.resolve import ResolvedModel
from tunesmith.train.judge import Ask, Score
from tunesmith.train.ranks import Ranks


@dataclass(frozen=True)
class TrainInputs:
    """What the loop works on."""

    training: Sequence[Conversation]
    validation: Sequence[Conversation]
    model: ResolvedModel
    renderer: Renderer
    machine: Machine
    seed: int
    ask: Ask | None = None
    score: Score | None = None
    validated: Callable[[int, float], None] | None = None
    general: Mapping[str, Sequence[Conversation]] = field(default_factory=dict)
    """Rows that `train.keep` names, by the path given there."""
    start: Path | None = None
    """The folder of an adapter or model to start from."""
    ranks: Ranks = field(default_factory=Ranks)
