"""What requests look like: OpenAI's bodies, checked. Keys that only their own servers know are ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tunesmith.conversation.message import Message
from tunesmith.serve.asked import Asked

Penalty = Annotated[float, Field(ge=-2, le=2)]
MOST = 256  # answers to one request
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")


class TextPart(Body):
    """A part of a message. Only text is read here."""

    type: str
    text: str = ""

    @model_validator(mode="after")
    def _text(self) -> TextPart:
        if self.type != "text":
            raise ValueError(f"only parts of type 'text' can be read by the models of this server, not '{self.type}'")
        return self


class CalledFunction(Body):
    name: str
    arguments: str = "{}"


class ToolCall(Body):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of role '{self.role}' needs content")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only a message of role 'assistant' has tool_calls")
        return self

    def message(self) -> Message:
        """As everything inside speaks of it: as rows of data are read."""
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        more: dict[str, Any] = {}
        if self.tool_calls:
            more["tool_calls"] = [
                ({"id": call.id} if call.id else {})
                | {
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _parsed(call.function.arguments)},
                }
                for call in self.tool_calls
            ]
        more |= {k: v for k in ("name", "tool_call_id", "reasoning_content") if (v := getattr(self, k)) is not None}
        return Message(role, text, more=more)


def _parsed(arguments: str) -> Any:
    """A call's arguments as an object, which is what templates take."""
    try:
        found = json.loads(arguments or "{}")
        json.dumps(found, ensure_ascii=False).encode()
    except ValueError:  # no JSON, or with half of a letter (a lone surrogate), which no template can write
        return arguments
    return found


class Function(Body):
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(BaseModel):
    model_config = ConfigDict(extra="ignore", populate_by_name=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("type json_schema needs json_schema")
        return self

    def grammar(self) -> dict[str, Any] | None:
        if self.type == "text":
            return None
        return self.json_schema.schema_ if self.json_schema is not None and self.type == "json_schema" else {}


class StreamOptions(Body):
    include_usage: bool = False


class Sampled(Body):
    """What both kinds of completions share."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Seed | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @field_validator("logit_bias")
    @classmethod
    def _ids(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        wrong = next((k for k in value or () if not (k.isascii() and k.isdigit() and len(k) < 10)), None)
        if wrong is not None:
            raise ValueError(f"'{wrong}' is not a token's id")
        return value

    @property
    def with_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self, temperature: float) -> dict[str, Any]:
        """The fields of `Asked` that both share; `temperature` is of requests that name none."""
        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "model": self.model,
            "n": self.n or 1,
            "temperature": temperature if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "seed": self.seed,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "logit_bias": {int(k): v for k, v in (self.logit_bias or {}).items()},
            "stop": tuple(text for text in stop if text),
            "user": self.user,
        }


class ChatBody(Sampled):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    safety_identifier: str | None = None

    @model_validator(mode="after")
    def _together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self

    def asked(self, temperature: float, longest: int | None) -> Asked:
        choice: Any = self.tool_choice or "auto"
        sampling = self.sampling(temperature)
        sampling["user"] = self.safety_identifier or self.user
        return Asked(
            messages=tuple(m.message() for m in self.messages),
            tools=tuple(t.model_dump(exclude_none=True) for t in self.tools or ()),
            tool_choice=("name", choice.function.name) if isinstance(choice, NamedTool) else choice,
            parallel=self.parallel_tool_calls is not False,
            grammar=self.response_format.grammar() if self.response_format else None,
            max_tokens=self.max_completion_tokens or self.max_tokens,
            longest=longest,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            **sampling,
        )


Ids = Annotated[list[int], Field(min_length=1)]
Texts = Annotated[list[str], Field(min_length=1, max_length=2048)]


class CompletionBody(Sampled):
    prompt: str | Texts | Ids | Annotated[list[Ids], Field(min_length=1, max_length=2048)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    best_of: Annotated[int, Field(ge=1, le=20)] | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _can_be_done(self) -> CompletionBody:
        if self.suffix:
            raise ValueError("suffix can't be given: these models only write forwards")
        count = len(prompts(self.prompt)) * (self.n or 1)
        if count > MOST:
            raise ValueError(f"n answers to each prompt would be {count}; one request can ask for {MOST}")
        if (self.best_of or 1) > (self.n or 1):
            raise ValueError("best_of above n can't be given")
        return self

    def asked(self, temperature: float, longest: int | None) -> Asked:
        return Asked(
            prompts=prompts(self.prompt),
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            top_logprobs=self.logprobs,
            echo=bool(self.echo) and self.logprobs is not None,
            **self.sampling(temperature),
        )


class EmbeddingBody(Body):
    model: str
    input: str | Texts | Ids | Annotated[list[Ids], Field(min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: str | None = None


def prompts(given: str | list[Any]) -> tuple[str | list[int], ...]:
    """One or many, as texts or as token ids."""
    if isinstance(given, str) or isinstance(given[0], int):
        return (given,)
    return tuple(given)


class LoadBody(Body):
    lora_name: Annotated[str, Field(min_length=1, max_length=512, pattern=r"^[^\x00-\x1f\x7f]+$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    base_model_name: str | None = None
    load_inplace: bool = False


class UnloadBody(Body):
    lora_name: Annotated[str, Field(min_length=1, max_length=512)]


class FeedbackBody(Body):
    """What somebody says of an answer."""

    id: Annotated[str, Field(min_length=1, max_length=255)]
    rating: Annotated[float, Field(ge=-1, le=1)] | None = None
    correction: Annotated[str, Field(max_length=1 << 20)] | None = None
    comment: Annotated[str, Field(max_length=1 << 16)] | None = None

    @model_validator(mode="after")
    def _something(self) -> FeedbackBody:
        if self.rating is None and self.correction is None and self.comment is None:
            raise ValueError("give a rating, a correction or a comment")
        return self
