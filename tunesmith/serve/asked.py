"""What is asked and what comes back, whoever answers: a model here, an endpoint elsewhere, a cache."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tunesmith.conversation.message import Message
from tunesmith.errors import TunesmithError
from tunesmith.inference.served import TokenLogprob

Finish = Literal["stop", "length", "tool_calls", "content_filter"]


class Refused(TunesmithError):
    """What a request asks for can't be had. `status`, `code` and `param` are what HTTP says of it."""

    def __init__(
        self,
        what: str,
        *,
        status: int = 400,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(what)
        self.status, self.code, self.param, self.retry_after = status, code, param, retry_after


@dataclass(frozen=True)
class Asked:
    """One request.

    Attributes:
        messages: of a chat; else `prompts` has a text or token ids for each answer.
        tool_choice: auto, none, required, or ("name", NAME).
        grammar: a JSON schema that answers must fulfil; {} for any JSON object.
        n: answers to each prompt.
        max_tokens: the longest answer that the client wants; with the prompt it must fit the context.
        longest: of requests that name none; as much of it as the context leaves.
        top_logprobs, echo: as in `inference.served.Request`.
        user: who the answer is for, in the client's words; routes stick to it.
    """

    model: str
    messages: tuple[Message, ...] = ()
    prompts: tuple[str | list[int], ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    tool_choice: str | tuple[str, str] = "auto"
    parallel: bool = True
    grammar: dict[str, Any] | None = None
    n: int = 1
    max_tokens: int | None = None
    longest: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    echo: bool = False
    user: str | None = None

    @property
    def deterministic(self) -> bool:
        """Whether the same request always gets the same answer."""
        return (self.temperature == 0 or self.seed is not None) and self.n == 1


@dataclass(frozen=True)
class Call:
    """A tool that is called; `arguments` as JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Delta:
    """What has come of one of the answers. `prompt` is on its first one; `finish`, `cached`, `drafted` and `accepted`
    are on its last.
    """

    choice: int = 0
    text: str = ""
    calls: tuple[Call, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    tokens: int = 0
    finish: Finish | None = None
    cached: int = 0
    drafted: int = 0
    accepted: int = 0
    prompt: tuple[TokenLogprob, ...] = ()


Deltas = AsyncGenerator[Delta, None]


@dataclass(frozen=True)
class Passage:
    """What retrieval found for a question."""

    text: str
    source: str
    title: str = ""
    score: float = 0.0


@dataclass
class Started:
    """An answer that has begun.

    Attributes:
        model: who answers, which routing may have chosen.
        prompt_tokens: of all prompts.
        deltas: of all answers, as they come. Closing it frees what they hold.
        prompts: the prompts' texts, for `echo`.
        sources: what was found for the question, in the order in which the prompt numbers it.
        flags: what guards found; more comes as the answer does.
        hit: whether the answer comes from the cache.
        source: the innermost stream that has begun, whatever was put around it since.
    """

    model: str
    prompt_tokens: int
    deltas: Deltas
    prompts: tuple[str, ...] = ()
    sources: tuple[Passage, ...] = ()
    flags: list[str] = field(default_factory=list)
    hit: bool = False
    source: Deltas | None = None

    async def aclose(self) -> None:
        """Free what the answer holds, whether or not anything of it was read."""
        await self.deltas.aclose()
        if self.source is not None:
            await self.source.aclose()
