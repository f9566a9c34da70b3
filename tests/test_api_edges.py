"""Requests at the edge: many answers at once, schemas that refer to themselves, other sites' pages, deep nesting."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import jsonschema
import pytest

from tests.scripted import HERMES, HI, Scripted, ask, scripted, served
from tunesmith.inference.served import Piece, Request
from tunesmith.serve.streams import merged


def test_many_streams_take_as_few_tasks_as_run_at_once() -> None:
    most, ended = 0, 0

    async def stream(number: int) -> AsyncGenerator[int, None]:
        nonlocal most, ended
        try:
            most = max(most, len(asyncio.all_tasks()))
            await asyncio.sleep(0)
            yield number
        finally:
            ended += 1

    async def through() -> None:
        nonlocal ended
        found = [n async for n in merged([stream(i) for i in range(500)], 4)]
        assert sorted(found) == list(range(500)) and ended == 500 and most <= 4 + 2
        ended = 0
        streams = [stream(i) for i in range(500)]
        some = merged(streams, 4)
        assert await anext(some) == 0
        await some.aclose()
        assert ended < 500 and all(s.ag_frame is None for s in streams)  # closed, those too that never began

    asyncio.run(through())


HALF = "a\ud83d"  # a letter's first half alone, which JSON can spell
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", {"messages": [{"role": "user", "content": HALF}]}),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]}),
        ("chat/completions", {"messages": [*HI, {"role": "tool", "content": "x", "tool_call_id": HALF}]}),
        ("chat/completions", {"messages": HI, "stop": HALF, "stream": True}),
        ("chat/completions", {"messages": HI, "user": HALF}),
        ("chat/completions", {"messages": HI, HALF: 1}),
        (
            "chat/completions",
            {"messages": HI, "tools": [{**TOOL, "function": {**TOOL["function"], "description": HALF}}]},
        ),
        ("completions", {"prompt": ["a", HALF]}),
        ("embeddings", {"input": HALF}),
        ("load_lora_adapter", {"lora_name": HALF, "lora_path": HALF}),
        ("feedback", {"id": "chatcmpl-1", "comment": HALF}),
    ],
)
def test_half_of_a_letter_is_no_text(path: str, body: dict[str, Any]) -> None:
    with served(scripted(template=HERMES)) as http:
        spelt = json.dumps({"model": "scripted"} | body).encode()
        for content in (spelt, spelt.replace(b"\\ud83d", b"\xed\xa0\xbd"), json.dumps(body).encode("utf-16")):
            refused = http.post(f"/v1/{path}", content=content, headers={"content-type": "application/json"})
            assert refused.status_code == 400, refused.text
            error = refused.json()["error"]
            assert error["code"] == "invalid_json" and "half of a letter" in error["message"]
        whole = spelt.replace(b"\\ud83d", b"\\ud83d\\ude00")
        refused = http.post(f"/v1/{path}", content=whole, headers={"content-type": "application/json"})
        assert "half of a letter" not in refused.text and refused.status_code < 500


CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"place": "\\ud83d"}'}}


@pytest.mark.parametrize(
    ("message", "status"),
    [
        ({"role": "user"}, 400),
        ({"role": "user", "content": None}, 400),
        ({"role": "user", "content": 5}, 400),
        ({"role": "user", "content": True}, 400),
        ({"role": "user", "content": {}}, 400),
        ({"role": "user", "content": {"type": "text", "text": "Hi"}}, 400),
        ({"role": "user", "content": [5]}, 400),
        ({"role": "user", "content": [None]}, 400),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, 400),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://10.0.0.1/"}}]}, 400),
        ({"role": "user", "content": []}, 200),
        ({"role": "user", "content": ""}, 200),
        ({"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, 200),
        ({"role": "user", "content": "\x00\uffff\U0010fffd"}, 200),
        ({"role": "assistant", "content": None}, 400),
        ({"role": "assistant", "tool_calls": [CALL]}, 200),
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, 200),
        ({"role": "assistant", "content": None, "tool_calls": []}, 400),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1", "type": "function"}]}, 400),
        ({"role": "tool", "content": None, "tool_call_id": "1"}, 400),
        ({"role": "tool", "content": "sunny", "tool_call_id": 1}, 400),
    ],
)
@pytest.mark.parametrize("template", [HERMES, None])
def test_contents_of_every_kind(message: dict[str, Any], status: int, template: str | None) -> None:
    with served(scripted(template=template)) as http:
        answer = ask(http, messages=[*HI, message])
        assert answer.status_code == status, answer.text
        if status == 400:
            assert answer.json()["error"]["param"].startswith("messages.1")


def test_answers_to_one_request_have_an_end() -> None:
    with served(scripted("Yes.")) as http:
        body = {"model": "scripted", "prompt": [[5]] * 64, "max_tokens": 1}
        refused = http.post("/v1/completions", json=body | {"n": 5})
        assert refused.status_code == 400 and "320" in refused.json()["error"]["message"]
        assert len(http.post("/v1/completions", json=body | {"n": 4}).json()["choices"]) == 256


TREE = {
    "type": "object",
    "properties": {"root": {"$ref": "#/$defs/Node"}, "$ref": {"type": "string"}},
    "required": ["root"],
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"leaf": {"$ref": "#/definitions/Leaf"}, "next": {"$ref": "#/$defs/Node"}},
            "additionalProperties": False,
        }
    },
    "definitions": {"Leaf": {"enum": ["oak", "elm"]}},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": TREE}} for name in ("grow", "fell")]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "fell"}}, "auto"])
def test_schemas_that_refer_to_themselves_hold_for_calls(choice: Any) -> None:
    llguidance = pytest.importorskip("llguidance")
    call = {"name": "fell", "arguments": {"root": {"leaf": "oak", "next": {"leaf": "elm"}}}}
    engine = scripted(json.dumps(call), HERMES, context=4096)
    more: dict[str, Any] = {"tools": TOOLS, "tool_choice": choice}
    if choice == "auto":
        more["response_format"] = {"type": "json_schema", "json_schema": {"name": "tree", "schema": TREE}}
    with served(engine) as http:
        message = ask(http, **more).json()["choices"][0]["message"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == call["arguments"]
    schema = engine.asked[-1].grammar
    assert schema is not None
    jsonschema.validate(call, schema)
    for wrong in ({"root": {"leaf": "ash"}}, {"root": {"next": {"next": {"leaf": 1}}}}, {"root": {}, "$ref": 3}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(call | {"arguments": wrong}, schema)
    matcher = llguidance.LLMatcher
    assert not matcher.validate_grammar(matcher.grammar_from_json_schema(json.dumps(schema)))


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example"}, "foreign_host"),
        ({"host": "127.0.0.1.evil.example:8000"}, "foreign_host"),
        ({"origin": "https://evil.example"}, "foreign_origin"),
        ({"origin": "null"}, "foreign_origin"),
        ({"sec-fetch-site": "cross-site"}, "foreign_origin"),
        ({"sec-fetch-site": "same-site"}, "foreign_origin"),
        ({"content-type": "text/plain"}, "invalid_json"),
        ({"content-type": ""}, "invalid_json"),
        ({"host": "localhost:8000", "origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}, None),
        ({"host": "[::1]:8000"}, None),
        ({"origin": "https://app.example", "sec-fetch-site": "cross-site"}, None),
        ({}, None),
    ],
)
def test_without_keys_no_other_sites_page_is_let_in(headers: dict[str, str], code: str | None) -> None:
    engine = scripted()
    with served(engine, cors=("https://app.example",)) as http:
        body = json.dumps({"model": "scripted", "messages": HI})
        headers = {"content-type": "application/json"} | headers
        done = http.post("/v1/chat/completions", content=body, headers={k: v for k, v in headers.items() if v})
    if code is None:
        assert done.status_code == 200, done.text
    else:
        assert done.status_code in (400, 403) and done.json()["error"]["code"] == code and not engine.asked


def test_with_a_key_any_name_and_origin_is_let_in() -> None:
    with served(scripted(), keys=("sk-1",)) as http:
        headers = {"host": "api.example", "origin": "https://app.example", "authorization": "Bearer sk-1"}
        body = {"model": "scripted", "messages": HI}
        assert http.post("/v1/chat/completions", json=body, headers=headers).status_code == 200


def test_the_longest_answer_of_requests_that_name_none_is_what_the_context_leaves() -> None:
    engine = scripted()
    with served(engine, max_new_tokens=500) as http:
        assert ask(http).status_code == 200
        assert engine.asked[-1].max_new_tokens == 512 - len(engine.asked[-1].prompt) < 500
        assert ask(http, max_tokens=500).json()["error"]["code"] == "context_length_exceeded"
    with served(engine, max_new_tokens=3) as http:
        assert ask(http).json()["choices"][0]["finish_reason"] == "length"


def test_log_probabilities_of_tokens_without_text_are_told() -> None:
    class Whole(Scripted):
        """Its tokens come without text, which comes at the end: each may have been half of a letter."""

        async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
            pieces = [piece async for piece in super().stream(request)]
            for piece in pieces[:-1]:
                yield replace(piece, text="")
            yield replace(pieces[-1], text="".join(p.text for p in pieces))

    engine = Whole(scripted().renderer, lambda _: "Yes.")
    with served(engine) as http:
        body = {"model": "scripted", "prompt": "?", "logprobs": 1, "max_tokens": 9}
        whole = http.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]["tokens"]
        lines = http.post("/v1/completions", json=body | {"stream": True}).text.splitlines()
    told = [json.loads(line[6:])["choices"][0] for line in lines if line.startswith("data: {")]
    assert [t for choice in told for t in choice["logprobs"]["tokens"]] == whole and len(whole) > 2


def test_a_prompts_cached_tokens_count_once() -> None:
    with served(scripted()) as http:
        assert ask(http, n=3).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 2
        body = {"model": "scripted", "prompt": ["a", "b"], "n": 2}
        assert http.post("/v1/completions", json=body).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 4


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": {"a": 1}, "arguments": {}}</tool_call>',
        "<tool_call>" + "[" * 200_000 + "</tool_call>",
        "<tool_call><function=grow><parameter=root>" + "[" * 200_000 + "</parameter></function></tool_call>",
    ],
    ids=["name", "deep", "deep-argument"],
)
def test_what_only_looks_like_a_call_is_text(text: str) -> None:
    from tunesmith.serve.tools import Format, Reader

    reader = Reader(Format(), TOOLS)
    shown, calls = reader.feed(text, True)
    assert (shown == text and not calls) or "function=" in text


def test_tools_can_be_called_where_any_json_is_asked_for() -> None:
    engine = scripted('{"name": "fell", "arguments": {"root": {}}}', HERMES, context=4096)
    with served(engine) as http:
        choice = ask(http, tools=TOOLS, response_format={"type": "json_object"}).json()["choices"][0]
        assert engine.asked[-1].grammar == {}
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["tool_calls"][0]["function"]["name"] == "fell"


def test_a_name_holds_no_line_break_and_pages_may_read_when_to_come_again() -> None:
    with served(scripted(), cors=("https://app.example",)) as http:
        body = {"lora_name": "a\r\nset-cookie: b", "lora_path": "/nowhere"}
        assert http.post("/v1/load_lora_adapter", json=body).json()["error"]["param"] == "lora_name"
        exposed = http.get("/health", headers={"origin": "https://app.example"}).headers
        assert "retry-after" in exposed["access-control-expose-headers"]
