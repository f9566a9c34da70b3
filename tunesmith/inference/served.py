"""What serving needs of an engine: token ids in, tokens out as they come, many requests at once.

One renderer makes the prompt's ids and every engine is given those, so no engine can disagree about a template. An
engine's model lives in a process of its own, which is watched and started again; who asks never dies with it.

EngineError
├── EngineDown      the engine's process ended, or was not there yet; ask again later
├── EngineFull      as many requests wait as may
├── TooLong         prompt and answer don't fit the context
├── GrammarError    the schema can't be enforced
├── UnknownAdapter  no adapter of that name is loaded
└── Unserved        this engine can't do what was asked (embeddings, a bias, ...)
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from tunesmith.errors import TunesmithError

COLDEST = 1e-4  # a lower temperature is 0: scores that are divided by it leave the range of numbers
Health = Literal["starting", "ready", "restarting", "failed"]
Finish = Literal["stop", "length"]


class EngineError(TunesmithError):
    """An engine did not answer."""


class EngineDown(EngineError):
    """The engine's process is not there: it ended with this request in flight, or has not begun.

    `retry_after` is in seconds.
    """

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, retry_after: int = 2) -> None:
        super().__init__(what, where=where, fix=fix)
        self.retry_after = retry_after


class EngineFull(EngineError):
    """As many requests wait as may. `retry_after` is in seconds."""

    def __init__(self, what: str, *, where: str | None = None, fix: str | None = None, retry_after: int = 1) -> None:
        super().__init__(what, where=where, fix=fix)
        self.retry_after = retry_after


class TooLong(EngineError):
    """A prompt does not fit the context, all in tokens."""

    def __init__(self, prompt: int, context: int) -> None:
        super().__init__(
            f"this model's maximum context length is {context} tokens; the prompt alone has {prompt}",
            fix="Shorten the messages.",
        )
        self.prompt, self.context = prompt, context


class GrammarError(EngineError):
    """A JSON schema can't be enforced."""


class UnknownAdapter(EngineError):
    """No adapter of that name is loaded."""


class Unserved(EngineError):
    """This engine can't do what was asked of it."""


@dataclass(frozen=True)
class Request:
    """One answer that is asked for.

    Attributes:
        prompt: token ids, from the renderer.
        stop_ids: ids that end the answer; none of them is returned.
        adapter: the name of one that is loaded; None for the model as it is.
        temperature: 0 takes the likeliest token, as anything below `COLDEST` does.
        logit_bias: what is added to the scores of ids.
        stop: texts; what is returned ends before the first of them.
        top_logprobs: how many of the likeliest tokens are told with each; None for no log-probabilities at all.
        grammar: a JSON schema that the answer must fulfil; {} for any JSON object.
        echo: the prompt's log-probabilities are told, too, on the first piece; takes `top_logprobs`.
        whole: nobody reads along, so the answer may come in one piece, which takes an engine less.
    """

    prompt: list[int]
    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    adapter: str | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    grammar: dict[str, Any] | None = None
    echo: bool = False
    whole: bool = False

    def __post_init__(self) -> None:
        if self.temperature < COLDEST:
            object.__setattr__(self, "temperature", 0.0)


@dataclass(frozen=True)
class TokenLogprob:
    """A token that was chosen (`top`: the likeliest at its place, likeliest first) or could have been (`top` empty).

    `data` are its bytes: a token may hold a part of a letter only. Log-probabilities are the model's own, before
    temperature and penalties; NaN for a prompt's first token, which nothing stands before.
    """

    id: int
    data: bytes
    logprob: float
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        return self.data.decode("utf-8", "replace")


@dataclass(frozen=True)
class Piece:
    """What has come since the last piece. Text is whole letters, and is held back where a stop text may begin.

    Attributes:
        finish: on the last piece only.
        cached: prompt tokens that were taken from the prefix cache (last piece).
        drafted, accepted: tokens that a draft model proposed, and that were taken (last piece).
        prompt: the prompt's tokens, where the request asked for their `echo` (first piece).
    """

    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    prompt: tuple[TokenLogprob, ...] = ()


class ServingEngine(Protocol):
    """A model that answers many at once.

    Attributes:
        name: of the model, for messages and metrics.
        kind: "llamacpp", "transformers", "vllm", "endpoint".
        context: tokens that prompt and answer may have together.
        slots: how many requests are answered at once; further ones wait.
    """

    name: str
    kind: str
    context: int
    slots: int

    async def start(self) -> None:
        """Start the process and wait until it answers.

        Raises:
            ModelError: the model can't be loaded.
            MachineError: a library is missing.
        """

    async def close(self) -> None:
        """End the process. Requests in flight get EngineDown."""

    def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        """The answer's pieces; `aclose` frees the slot at once.

        Raises:
            EngineError: one of its kinds, at the first piece or later (EngineDown).
        """

    async def embed(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        """A vector for each prompt, of length 1."""

    async def load_adapter(self, name: str, path: Path) -> None:
        """Make a LoRA folder answer under a name, while others are answered.

        Raises:
            ModelError: the folder is no adapter of this model.
        """

    async def unload_adapter(self, name: str) -> None:
        """Requests that use it end first.

        Raises:
            UnknownAdapter: there is none of that name.
        """

    def adapters(self) -> list[str]:
        """The names that are loaded."""

    def health(self) -> Health:
        """What can be expected of a request now."""
