"""Chat, completions, embeddings and models, by the real client over a real socket."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import openai
import psutil
import pytest
from pydantic import BaseModel
from starlette.testclient import TestClient

from tests.scripted import HERMES, Scripted, asked_text, running, scripted, state_of
from tunesmith.api.app import build
from tunesmith.inference.served import EngineDown, GrammarError, Request

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place",
        "parameters": {"type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]},
    },
}
CALLING = 'Let me see. <tool_call>\n{"name": "weather", "arguments": {"place": "Oslo"}}\n</tool_call>'
HI: list[Any] = [{"role": "user", "content": "What colour is it?"}]


def by(request: Request) -> str:
    """Answers for everything below: JSON under a grammar, else a sentence."""
    if request.grammar is None:
        return "Blue it is. Or red?"
    if "anyOf" in request.grammar or "name" in request.grammar.get("properties", {}):
        return '{"name": "weather", "arguments": {"place": "Rome"}}'
    return '{"colour": "blue"}'


@pytest.fixture(scope="module")
def engine() -> Scripted:
    return scripted(by)


@pytest.fixture(scope="module")
def url(engine: Scripted) -> Iterator[str]:
    with running(state_of(engine)) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_chat(client: openai.OpenAI, engine: Scripted) -> None:
    done = client.chat.completions.create(model="scripted", messages=HI, temperature=0, seed=5, stop=["Or"])
    choice = done.choices[0]
    assert choice.message.content == "Blue it is. " and choice.finish_reason == "stop"
    assert done.id.startswith("chatcmpl-") and done.object == "chat.completion" and choice.message.role == "assistant"
    assert done.usage is not None and done.usage.total_tokens == done.usage.prompt_tokens + done.usage.completion_tokens
    assert done.usage.prompt_tokens == len(engine.asked[-1].prompt)
    assert done.usage.prompt_tokens_details is not None and done.usage.prompt_tokens_details.cached_tokens == 2
    assert asked_text(engine) == "<|im_start|>user\nWhat colour is it?<|im_end|>\n<|im_start|>assistant\n"
    request = engine.asked[-1]
    assert (request.temperature, request.seed, request.stop) == (0, 5, ("Or",))
    assert request.stop_ids == tuple(engine.renderer.stop_ids)


def test_what_only_openais_servers_know_is_ignored(client: openai.OpenAI) -> None:
    more: dict[str, Any] = {"metadata": {"a": "b"}, "service_tier": "flex", "prompt_cache_key": "k", "user": "me"}
    done = client.chat.completions.create(model="scripted", messages=HI, store=True, **more)  # type: ignore[arg-type]
    assert done.choices[0].message.content == "Blue it is. Or red?"


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="scripted", messages=HI, stream=True, stream_options={"include_usage": True}, n=2
        )
    )
    assert len({c.id for c in chunks}) == len({c.created for c in chunks}) == 1
    for index in (0, 1):
        own = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert own[0].delta.role == "assistant" and own[0].delta.content == ""
        assert "".join(c.delta.content or "" for c in own) == "Blue it is. Or red?"
        assert [c.finish_reason for c in own if c.finish_reason] == ["stop"] and own[-1].delta.content is None
    assert all(c.usage is None for c in chunks[:-1])
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 4


def test_the_wire_of_a_stream(url: str) -> None:
    body = {"model": "scripted", "messages": HI, "stream": True}
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and all(line.startswith("data: ") for line in lines)
    assert all("usage" not in json.loads(line[6:]) for line in lines[:-1])


def test_sampling_reaches_the_engine(client: openai.OpenAI, engine: Scripted) -> None:
    client.chat.completions.create(
        model="scripted", messages=HI, n=3, seed=7, temperature=0.7, top_p=0.9, presence_penalty=0.5,
        frequency_penalty=-0.5, logit_bias={"5": -100}, max_completion_tokens=4, user="ada",
    )  # fmt: skip
    found = engine.asked[-3:]
    assert sorted(r.seed for r in found if r.seed is not None) == [7, 8, 9]
    one = found[0]
    assert (one.temperature, one.top_p, one.presence_penalty, one.frequency_penalty) == (0.7, 0.9, 0.5, -0.5)
    assert one.logit_bias == {5: -100} and one.max_new_tokens == 4


def test_log_probabilities(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="scripted", messages=HI, logprobs=True, top_logprobs=2, max_tokens=3
    ).choices[0]
    assert done.finish_reason == "length" and done.logprobs is not None and done.logprobs.content is not None
    assert "".join(t.token for t in done.logprobs.content) == done.message.content
    first = done.logprobs.content[0]
    assert first.logprob == -0.5 and bytes(first.bytes or []) == first.token.encode() and len(first.top_logprobs) == 2
    parts = client.chat.completions.create(model="scripted", messages=HI, logprobs=True, max_tokens=3, stream=True)
    told = [t.token for c in parts if c.choices[0].logprobs for t in c.choices[0].logprobs.content or []]
    assert told == [t.token for t in done.logprobs.content]


class Colour(BaseModel):
    colour: str


def test_json(client: openai.OpenAI, engine: Scripted) -> None:
    parsed = client.chat.completions.parse(model="scripted", messages=HI, response_format=Colour)
    assert parsed.choices[0].message.parsed == Colour(colour="blue")
    grammar = engine.asked[-1].grammar
    assert grammar is not None and grammar["properties"]["colour"]["type"] == "string"
    client.chat.completions.create(model="scripted", messages=HI, response_format={"type": "json_object"})
    assert engine.asked[-1].grammar == {}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("template", [HERMES, None], ids=["native", "plain"])
def test_tools(template: str | None, stream: bool) -> None:
    engine = scripted(lambda r: "Sunny." if "tool_response" in asked(r) or "tool\n" in asked(r) else CALLING, template)

    def asked(request: Request) -> str:
        return str(engine.renderer.tokenizer.decode(request.prompt))

    with running(state_of(engine)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        if stream:
            with client.chat.completions.stream(model="scripted", messages=HI, tools=[TOOL]) as events:  # type: ignore[list-item]
                done = events.get_final_completion()
        else:
            done = client.chat.completions.create(model="scripted", messages=HI, tools=[TOOL])  # type: ignore[list-item,assignment]
        choice = done.choices[0]
        assert choice.finish_reason == "tool_calls" and choice.message.content == "Let me see. "
        assert "weather" in asked_text(engine) and "The weather of a place" in asked_text(engine)
        call = choice.message.tool_calls[0]  # type: ignore[index]
        assert call.id.startswith("call_") and call.type == "function"
        assert call.function.name == "weather" and json.loads(call.function.arguments) == {"place": "Oslo"}
        told = choice.message.to_dict()
        messages = [*HI, told, {"role": "tool", "tool_call_id": call.id, "content": "20 degrees"}]
        after = client.chat.completions.create(model="scripted", messages=messages, tools=[TOOL])  # type: ignore[list-item]
        assert after.choices[0].message.content == "Sunny."
        text = asked_text(engine)
        assert "<tool_call>" in text and '"Oslo"' in text and "20 degrees" in text


FIRST = "{{ (tools | tojson) if tools and loop.first else '' }}"
BEGIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n" + FIRST + "{{ m.content }}"
END = "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EACH = "{% for c in m.tool_calls or [] %}"
WAYS = {
    "llama": (
        EACH + '{"name": "{{ c.function.name }}", "parameters": {{ c.function.arguments | tojson }}}{% endfor %}',
        '{"name": "weather", "parameters": {"place": "Oslo"}}',
    ),
    "mistral": (
        "{% if m.tool_calls %}[TOOL_CALLS] [" + EACH + '{"name": "{{ c.function.name }}", "arguments": '
        "{{ c.function.arguments | tojson }}}{% if not loop.last %}, {% endif %}{% endfor %}]{% endif %}",
        '[TOOL_CALLS] [{"name": "weather", "arguments": {"place": "Oslo"}}, '
        '{"name": "weather", "arguments": {"place": "Rome"}}]',
    ),
    "xml": (
        EACH + "<tool_call>\n<function={{ c.function.name }}>\n{% for k, v in c.function.arguments.items() %}"
        "<parameter={{ k }}>\n{{ v }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}",
        "<tool_call>\n<function=weather>\n<parameter=place>\nOslo\n</parameter>\n</function>\n</tool_call>",
    ),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_calls_are_read_as_the_template_writes_them(way: str, stream: bool) -> None:
    written, answer = WAYS[way]
    engine = scripted(answer, BEGIN + written + END)
    with TestClient(build(state_of(engine))) as http:
        body = {"model": "scripted", "messages": HI, "tools": [TOOL], "stream": stream}
        response = http.post("/v1/chat/completions", json=body)
        if stream:
            events = [json.loads(x[6:])["choices"][0] for x in response.text.splitlines() if x.startswith("data: {")]
            calls = [c for e in events for c in e["delta"].get("tool_calls", ())]
            assert [c["index"] for c in calls] == list(range(len(calls))) and events[-1][
                "finish_reason"
            ] == "tool_calls"
            assert not any(e["delta"].get("content") for e in events)
        else:
            calls = response.json()["choices"][0]["message"]["tool_calls"]
        places = [json.loads(c["function"]["arguments"])["place"] for c in calls]
        assert places == (["Oslo", "Rome"] if way == "mistral" else ["Oslo"])
        engine.reply = lambda _: "No tool is needed, {not} even <one."
        text = http.post("/v1/chat/completions", json=body | {"stream": False}).json()["choices"][0]
        assert text["message"]["content"] == "No tool is needed, {not} even <one." and text["finish_reason"] == "stop"
        engine.reply = lambda _: answer.replace("weather", "unknown")
        other = http.post("/v1/chat/completions", json=body | {"stream": False}).json()["choices"][0]["message"]
        assert "unknown" in other["content"] and "tool_calls" not in other


def test_a_tool_that_must_be_called(client: openai.OpenAI, engine: Scripted) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in (named, "required"):
        done = client.chat.completions.create(model="scripted", messages=HI, tools=[TOOL], tool_choice=choice)  # type: ignore[list-item]
        call = done.choices[0].message.tool_calls[0]  # type: ignore[index]
        assert json.loads(call.function.arguments) == {"place": "Rome"} and not done.choices[0].message.content  # type: ignore[union-attr]
        grammar = engine.asked[-1].grammar
        assert grammar is not None and grammar["properties"]["name"] == {"const": "weather"}
        assert asked_text(engine).endswith("<tool_call>")
    client.chat.completions.create(model="scripted", messages=HI, tools=[TOOL], tool_choice="none")  # type: ignore[list-item]
    assert engine.asked[-1].grammar is None and "weather" not in asked_text(engine)
    with pytest.raises(openai.BadRequestError, match="not in tools") as refused:
        wrong: Any = {"type": "function", "function": {"name": "nothing"}}
        client.chat.completions.create(model="scripted", messages=HI, tools=[TOOL], tool_choice=wrong)  # type: ignore[list-item]
    assert refused.value.code == "unknown_tool"


def test_completions(client: openai.OpenAI, engine: Scripted) -> None:
    done = client.completions.create(model="scripted", prompt=["What", "Who"], n=2, echo=True, max_tokens=3)
    assert [c.index for c in done.choices] == [0, 1, 2, 3]
    assert [c.text[:3] for c in done.choices] == ["Wha", "Wha", "Who", "Who"]
    assert all(c.finish_reason == "length" for c in done.choices)
    ids = engine.renderer.text_ids("What")
    one = client.completions.create(model="scripted", prompt=ids, logprobs=1, max_tokens=3)
    assert engine.asked[-1].prompt == ids and one.object == "text_completion"
    told = one.choices[0].logprobs
    assert told is not None and "".join(told.tokens or []) == one.choices[0].text
    assert told.text_offset is not None and told.text_offset[0] == 0
    parts = list(client.completions.create(model="scripted", prompt="What", stream=True, echo=True))
    assert "".join(p.choices[0].text for p in parts) == "WhatBlue it is. Or red?"
    assert parts[-1].choices[0].finish_reason == "stop"


def test_an_echo_with_log_probabilities_is_as_openai_had_it(client: openai.OpenAI, engine: Scripted) -> None:
    prompt = "What colour"
    ask: dict[str, Any] = {"model": "scripted", "prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 3}
    choice = client.completions.create(**ask).choices[0]
    told: Any = choice.logprobs
    assert "".join(told.tokens) == choice.text and choice.text.startswith(prompt)
    assert len(told.tokens) == len(engine.renderer.text_ids(prompt)) + 3
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert all(value == -0.5 for value in told.token_logprobs[1:]) and all(told.top_logprobs[1:])
    assert [choice.text[at : at + len(t)] for at, t in zip(told.text_offset, told.tokens, strict=True)] == told.tokens
    parts = [part.choices[0] for part in client.completions.create(**ask, stream=True)]
    lists = [part.logprobs.to_dict() for part in parts if part.logprobs]
    for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
        assert [value for part in lists for value in part[key]] == getattr(told, key)
    assert "".join(part.text for part in parts) == choice.text
    only = client.completions.create(**ask | {"max_tokens": 0, "logprobs": 0}).choices[0]
    assert only.text == prompt and only.logprobs is not None and "".join(only.logprobs.tokens or []) == prompt


def test_embeddings(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model="scripted", input=["a", "what colour"])
    assert [len(e.embedding) for e in found.data] == [4, 4] and sum(found.data[0].embedding) == 1.0
    plain = client.embeddings.create(model="scripted", input="a", encoding_format="float", dimensions=2)
    assert len(plain.data[0].embedding) == 2 and found.usage.prompt_tokens > 0


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["scripted"]
    assert client.models.retrieve("scripted").owned_by == "tunesmith"
    with pytest.raises(openai.NotFoundError) as gone:
        client.models.retrieve("ft:Qwen/Qwen3:org::1:ckpt-step-10")
    assert gone.value.code == "model_not_found"


BAD: list[tuple[dict[str, Any], str, str | None]] = [
    ({"model": "other"}, "model", "model_not_found"),
    ({"messages": []}, "messages", "invalid_value"),
    ({"messages": [{"role": "user"}]}, "messages.0", "invalid_value"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}]},
     "messages.0.content.0", "invalid_value"),
    ({"temperature": "hot"}, "temperature", "invalid_value"),
    ({"temperature": 3}, "temperature", "invalid_value"),
    ({"stop": ["a"] * 5}, "stop", "invalid_value"),
    ({"top_logprobs": 2}, "body", "invalid_value"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "invalid_value"),
    ({"max_tokens": 600}, "messages", "context_length_exceeded"),
    ({"messages": [{"role": "user", "content": "colour " * 600}]}, "messages", "context_length_exceeded"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "param", "code"), BAD)
def test_bad_requests(client: openai.OpenAI, change: dict[str, Any], param: str, code: str) -> None:
    with pytest.raises((openai.BadRequestError, openai.NotFoundError)) as refused:
        client.chat.completions.create(**{"model": "scripted", "messages": HI} | change)
    assert refused.value.code == code and (refused.value.param or "body") == param
    if code == "context_length_exceeded":
        assert "This model's maximum context length is 512 tokens" in refused.value.message


@pytest.mark.parametrize("change", [{"suffix": "end"}, {"n": 2, "best_of": 3}], ids=["suffix", "best_of"])
def test_what_completions_lack_is_told(client: openai.OpenAI, change: dict[str, Any]) -> None:
    with pytest.raises(openai.BadRequestError, match="can't be given") as refused:
        client.completions.create(model="scripted", prompt="x", **change)
    assert refused.value.code == "invalid_value"


def test_an_engine_that_fails() -> None:
    def fail(request: Request, token: int) -> None:
        text = engine.renderer.tokenizer.decode(request.prompt)
        if "Die late" in text and token == 2:
            raise EngineDown("it died")
        if "Die" in text and "late" not in text:
            raise EngineDown("it died", retry_after=4)
        if "Bad schema" in text:
            raise GrammarError("patterns are not known")
        if "Crash" in text:
            raise RuntimeError("inner secrets")

    engine = scripted(fail=fail)
    with running(state_of(engine)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:

        def ask(text: str, **more: Any) -> Any:
            return client.chat.completions.create(
                model="scripted", messages=[{"role": "user", "content": text}], **more
            )

        with pytest.raises(openai.InternalServerError) as down:
            ask("Die")
        assert down.value.status_code == 503 and down.value.response.headers["retry-after"] == "4"
        with pytest.raises(openai.BadRequestError) as bad:
            ask("Bad schema")
        assert bad.value.code == "invalid_schema"
        with pytest.raises(openai.InternalServerError) as crash:
            ask("Crash")
        assert crash.value.status_code == 500 and "secrets" not in str(crash.value)
        with pytest.raises(openai.APIError, match="started again"):
            list(ask("Die late", stream=True))
        assert ask("Live").choices[0].message.content == "Blue it is."
    assert engine.running == 0


def test_a_full_queue_says_when_to_come_again() -> None:
    engine = scripted(slots=1, queue=1, pause=0.05)
    with running(state_of(engine)) as url:

        async def many() -> list[Any]:
            async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
                asked = [client.chat.completions.create(model="scripted", messages=HI) for _ in range(6)]
                return await asyncio.gather(*asked, return_exceptions=True)

        found = asyncio.run(many())
    full = [f for f in found if isinstance(f, openai.RateLimitError)]
    assert len(full) == 4 and len(found) - len(full) == 2
    assert full[0].response.headers["retry-after"] == "3" and full[0].code == "engine_overloaded"


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_go_away_free_their_slot(stream: bool) -> None:
    engine = scripted("word " * 200, slots=2, pause=0.02)
    body = {"model": "scripted", "messages": HI, "stream": stream}
    with running(state_of(engine)) as url:

        async def leave() -> None:
            async with httpx2.AsyncClient() as http:
                asks = [asyncio.create_task(_read(http, url, body)) for _ in range(5)]
                await asyncio.sleep(0.3)
                assert engine.running == 2
                for ask in asks:
                    ask.cancel()
                await asyncio.gather(*asks, return_exceptions=True)

        asyncio.run(leave())
        end = time.monotonic() + 5
        while (engine.running or engine.waiting) and time.monotonic() < end:
            time.sleep(0.01)
        assert engine.running == engine.waiting == 0
        assert len(engine.asked) == 5


async def _read(http: httpx2.AsyncClient, url: str, body: Any) -> None:
    async with http.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as response:
        async for _ in response.aiter_bytes():
            pass


@pytest.mark.parametrize("count", [150, pytest.param(1000, marks=pytest.mark.proof)])
def test_many_requests_of_which_a_third_is_cancelled(count: int) -> None:
    """Nothing is lost and nothing leaks: slots, file handles and memory are back where they were."""
    engine = scripted("word " * 20, slots=8, queue=count, pause=0.001)
    dice = random.Random(5)
    process = psutil.Process()

    async def one(http: httpx2.AsyncClient, url: str, number: int) -> bool:
        body = {"model": "scripted", "messages": HI, "stream": number % 2 == 0}
        ask = asyncio.create_task(http.post(f"{url}/v1/chat/completions", json=body, timeout=300))
        if number % 3 == 0:
            await asyncio.sleep(dice.random() * 0.2)
            ask.cancel()
            await asyncio.gather(ask, return_exceptions=True)
            return True
        response = await ask
        whole = response.text.endswith("data: [DONE]\n\n") if body["stream"] else response.text.count("word") == 20
        return response.status_code == 200 and whole and '"error"' not in response.text

    async def many(url: str) -> list[bool]:
        limits = httpx2.Limits(max_connections=40, max_keepalive_connections=0)
        async with httpx2.AsyncClient(limits=limits) as http:
            return await asyncio.gather(*(one(http, url, number) for number in range(count)))

    with running(state_of(engine)) as url:
        asyncio.run(many(url))
        before, memory = process.num_fds(), process.memory_info().rss
        assert all(asyncio.run(many(url)))
        end = time.monotonic() + 60
        while (engine.running or engine.waiting or process.num_fds() > before + 2) and time.monotonic() < end:
            time.sleep(0.05)
        assert engine.running == engine.waiting == 0
        assert process.num_fds() <= before + 2
        assert process.memory_info().rss <= memory + 16 * 2**20
        figures = httpx2.get(f"{url}/metrics").text
    assert 'tunesmith_running{model="scripted",route="chat"} 0.0' in figures


def test_a_slow_reader_holds_no_slot() -> None:
    # As events a megabyte: more than sockets hold, so that most of it waits in our own memory.
    engine = scripted("word " * 1500, slots=1, context=1 << 20)
    small = httpx2.HTTPTransport(socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)])
    with running(state_of(engine)) as url, httpx2.Client(transport=small, timeout=120) as http:
        body = {"model": "scripted", "messages": HI, "stream": True}
        with http.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            end = time.monotonic() + 120
            while engine.running and time.monotonic() < end:
                time.sleep(0.01)
            assert engine.running == 0  # all of it was made, none of it was read
            other = httpx2.post(
                f"{url}/v1/chat/completions", json=body | {"stream": False, "max_tokens": 1}, timeout=60
            )
            assert other.status_code == 200
            read = list(lines)
            assert sum(len(line) for line in read) > 1_000_000 and read[-2] == "data: [DONE]"


def test_a_deadline() -> None:
    engine = scripted("word " * 100, pause=0.05)
    with running(state_of(engine, deadline=0.3)) as url:
        body: dict[str, Any] = {"model": "scripted", "messages": HI}
        late = httpx2.post(f"{url}/v1/chat/completions", json=body)
        assert late.status_code == 504 and late.json()["error"]["code"] == "deadline_exceeded"
        streamed = httpx2.post(f"{url}/v1/chat/completions", json=body | {"stream": True})
        assert '"code":"deadline_exceeded"' in streamed.text
    assert engine.running == 0
