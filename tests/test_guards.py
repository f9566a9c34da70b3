"""What guards find is never shown, however an answer is cut, escaped or wrapped in JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from tests.scripted import Scripted, asked_text, scripted, state_of
from tunesmith.api.app import build
from tunesmith.conversation.message import Message
from tunesmith.inference.served import TokenLogprob
from tunesmith.screen.hide import hidden
from tunesmith.screen.inside import is_json, replaced
from tunesmith.serve.asked import Call, Delta, Deltas
from tunesmith.serve.guards.guard import Finding, TextGuard
from tunesmith.serve.guards.screen import Guards
from tunesmith.serve.guards.texts import Blocklist
from tunesmith.serve.section import ServeSection

KEY = "sk-proj-abcdefghijklmnopqrstuvwxyz123456"
HI = [{"role": "user", "content": "What colour is it?"}]


def guards(*sections: dict[str, Any], ask: Any = None) -> Guards:
    return Guards(ServeSection(guards=sections).guards, ask, lambda *_: None)


def through(by: Guards, deltas: Sequence[Delta], structured: bool = False, choices: int = 1) -> list[Delta]:
    async def given_() -> Deltas:
        for delta in deltas:
            yield delta

    async def all_of_them() -> list[Delta]:
        return [d async for d in by.answered(given_(), [], structured, choices)]

    return asyncio.run(all_of_them())


def cut(text: str, sizes: Sequence[int]) -> list[Delta]:
    pieces, at = [], 0
    for size in sizes:
        pieces.append(Delta(text=text[at : at + size]))
        at += size
    return [*pieces, Delta(text=text[at:]), Delta(finish="stop")]


def shown(deltas: Sequence[Delta]) -> str:
    return "".join(d.text for d in deltas)


def ask(http: TestClient, **more: Any) -> Any:
    return http.post("/v1/chat/completions", json={"model": "scripted", "messages": HI} | more)


def guarded(engine: Scripted, *sections: dict[str, Any]) -> TestClient:
    return TestClient(build(state_of(engine, guards=sections)))


WORDS = st.sampled_from(
    [
        "swordfish",
        "ada@example.com",
        "many good words",
        "\n",
        " ",
        "code",
        "{",
        '"',
        KEY,
        "sword",
        "fish tank",
        "x" * 90,
    ]
)


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(WORDS, max_size=14),
    sizes=st.lists(st.integers(1, 120), max_size=12),
    actions=st.tuples(*[st.sampled_from(["block", "redact"])] * 3),
)
def test_what_is_found_in_the_whole_is_never_shown_however_it_is_cut(
    words: list[str], sizes: list[int], actions: tuple[str, str, str]
) -> None:
    text = " ".join(words)
    by = guards(
        {"kind": "secrets", "action": actions[0]},
        {"kind": "blocklist", "words": ["swordfish", "code swordfish", "swordfish many good"], "action": actions[1]},
        {"kind": "blocklist", "patterns": ["[a-z]+@example.com"], "action": actions[2]},
    )
    in_parts, at_once = through(by, cut(text, sizes)), through(by, cut(text, []))
    assert shown(in_parts) == shown(at_once)
    for guard in by.output:
        assert not [f for f in guard.find(shown(in_parts)) if f.kind != "secrets" or KEY in shown(in_parts)]
    if not any(guard.find(text) for guard in by.output):
        assert shown(in_parts) == text


def test_a_block_shows_nothing_that_another_guard_would_have_taken() -> None:
    by = guards({"kind": "secrets"}, {"kind": "blocklist", "words": ["swordfish"]})
    assert shown(through(by, cut(f"the swordfish then {KEY}", []))) == "the "
    mail = {"kind": "blocklist", "patterns": ["[a-z]+@[a-z.]+"], "action": "redact"}
    by = guards({"kind": "blocklist", "words": ["swordfish"]}, mail)
    assert shown(through(by, cut("ada@example.com has a swordfish", []))) == "[REMOVED] has a "


class Spans(TextGuard):
    """Finds what it is told to."""

    spans: tuple[tuple[int, int], ...] = ()

    def find(self, text: str) -> list[Finding]:
        return [Finding("spans", a, b, "#") for a, b in self.spans if b <= len(text)]


def test_cuts_that_overlap_take_all_that_they_cover() -> None:
    by = Guards([Spans(kind="spans", action="redact", spans=((10, 50), (40, 80)))], None, lambda *_: None)
    text = "".join(chr(ord("A") + i % 26) for i in range(600))
    for size in (1, 7, 260, 300):
        assert shown(through(by, cut(text, [size] * (600 // size)))) == text[:10] + "#" + text[80:]


@pytest.mark.parametrize("text", ['{"phone": 5551234567}', '{"joe.doe@example.com": 1, "b": [1.5, null]}'])
def test_redacted_json_is_redacted_and_json(text: str) -> None:
    found = hidden(text)
    assert is_json(found) and "5551234567" not in found and "joe.doe" not in found


JSON = st.recursive(
    st.one_of(
        st.integers(), st.booleans(), st.none(), st.text(max_size=12), st.sampled_from(["a swordfish", "swordfish"])
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.one_of(st.text(max_size=6), st.just("swordfish")), inner, max_size=4),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(value=JSON, escaped=st.booleans(), numbers=st.booleans())
def test_json_stays_json_and_no_reader_sees_what_was_found(value: Any, escaped: bool, numbers: bool) -> None:
    text = json.dumps([value])
    if escaped:
        text = text.replace("swordfish", "\\u0073word\\u0066ish")
    guard = Blocklist(words=("swordfish",), patterns=(r"\d+",) if numbers else ())
    left = json.loads(replaced(text, lambda t: [(f.start, f.end, f.instead) for f in guard.find(t)]))
    assert "swordfish" not in json.dumps(left, ensure_ascii=False).casefold()
    if not numbers and "swordfish" not in text and not escaped and not guard.find(text):
        assert left == [value]


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("text", ['{"a": "\\u0073wordfish"}', '{"a": "{\\"b\\": \\"\\\\u0073wordfish\\"}"}'])
def test_escapes_hide_nothing(text: str, structured: bool) -> None:
    word = {"kind": "blocklist", "words": ["swordfish"]}
    for size in (1, 5, 100):
        done = through(guards(word), cut(text, [size] * (len(text) // size)), structured)
        assert done[-1].finish == "content_filter" and "word" not in shown(done)
        kept = shown(through(guards(word | {"action": "redact"}), cut(text, [size] * (len(text) // size)), structured))
        assert "[REMOVED]" in kept and "word" not in kept
    called = through(guards(word | {"action": "redact"}), [Delta(calls=(Call("1", "f", text),), finish="tool_calls")])
    arguments = called[0].calls[0].arguments
    assert json.loads(arguments) and "word" not in arguments


def tokens(text: str) -> tuple[TokenLogprob, ...]:
    other = TokenLogprob(9, b"swordfish", -2.0)
    return tuple(TokenLogprob(i, c.encode(), -1.0, (other,)) for i, c in enumerate(text))


def test_log_probabilities_tell_nothing_that_the_text_does_not() -> None:
    text = "the swordfish, and no more"
    deltas = [Delta(text=c, logprobs=tokens(c)) for c in text] + [Delta(finish="stop")]
    word = {"kind": "blocklist", "words": ["swordfish"]}
    for action, left in (("block", "the "), ("redact", "the , and no more"), ("flag", text)):
        told = [one for d in through(guards(word | {"action": action}), deltas) for one in d.logprobs]
        assert b"".join(one.data for one in told).decode() == left
        assert all(bool(one.top) == (action == "flag") for one in told)
    call = Call("1", "f", '{"a": "swordfish"}')
    done = through(
        guards(word | {"action": "redact"}),
        [Delta(text="Hi", logprobs=tokens("Hi")), Delta(calls=(call,), logprobs=tokens(call.arguments), finish="stop")],
    )
    assert not any(b"s" in one.data for d in done for one in d.logprobs)


def test_answers_that_come_mixed_are_looked_at_apart() -> None:
    texts = ("a swordfish is here", "blue it is, all of it")
    mixed = [Delta(i, c) for pair in zip(texts[0], texts[1], strict=False) for i, c in enumerate(pair)]
    mixed += [Delta(1, texts[1][len(texts[0]) :]), Delta(0, finish="stop"), Delta(1, finish="stop")]
    done = through(guards({"kind": "blocklist", "words": ["swordfish"]}), mixed, choices=2)
    assert shown([d for d in done if d.choice == 0]) == "a "
    assert shown([d for d in done if d.choice == 1]) == texts[1]
    assert {d.choice: d.finish for d in done if d.finish} == {0: "content_filter", 1: "stop"}


def test_all_that_a_client_writes_is_looked_at() -> None:
    engine = scripted()
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": "\\u0073wordfish"}'}}
    tool = {
        "type": "function",
        "function": {"name": "f", "description": "a swordfish", "parameters": {"type": "object"}},
    }
    written: list[dict[str, Any]] = [
        {"messages": [*first, {"role": role, "content": "swordfish"}, *HI]}
        for first, role in (([], "system"), ([], "developer"), (HI, "assistant"))
    ]
    written.append({"messages": [{"role": "user", "content": "Hi", "name": "swordfish"}]})
    written.append({"messages": [*HI, {"role": "assistant", "content": "", "reasoning_content": "swordfish"}, *HI]})
    written.append(
        {
            "messages": [
                *HI,
                {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "content": "1", "tool_call_id": "c1"},
            ]
        }
    )
    written.append({"tools": [tool]})
    with guarded(engine, {"kind": "blocklist", "words": ["swordfish"], "on": "input"}) as http:
        for more in written:
            refused = ask(http, **more)
            assert refused.status_code == 400 and refused.json()["error"]["code"] == "content_filter", more
        ids = engine.renderer.tokenizer("a swordfish")["input_ids"]
        refused = http.post("/v1/completions", json={"model": "scripted", "prompt": ids})
        assert refused.json()["error"]["code"] == "content_filter"
        fine = engine.renderer.tokenizer("a fish")["input_ids"]
        assert http.post("/v1/completions", json={"model": "scripted", "prompt": fine}).status_code == 200
        assert engine.asked[-1].prompt == fine
    with guarded(engine, {"kind": "blocklist", "words": ["swordfish"], "on": "input", "action": "redact"}) as http:
        http.post("/v1/completions", json={"model": "scripted", "prompt": ids})
        assert asked_text(engine).strip() == "a [REMOVED]"
        for more in written:
            assert ask(http, **more).status_code == 200 and "swordfish" not in asked_text(engine)


def test_a_judging_model_redacts_calls_and_json_and_is_not_asked_at_every_token() -> None:
    told: list[str] = []

    async def judge(model: str, messages: Sequence[Message]) -> str:
        told.append(messages[-1].content)
        return "unsafe" if "bad" in told[-1] else "safe"

    by = guards({"kind": "model", "model": "m", "action": "redact"}, ask=judge)
    assert json.loads(shown(through(by, cut('{"a": "bad"}', [3]), True))) != {"a": "bad"}
    call = Delta(calls=(Call("1", "f", '{"a": "bad", "n": 7}'),), finish="tool_calls")
    assert "bad" not in json.dumps(json.loads(through(by, [call])[0].calls[0].arguments))
    told.clear()
    text = "good words in a row " * 50 + "bad " + "and more of it " * 200
    done = shown(through(by, cut(text, [4] * 1000)))
    assert done.endswith("[REMOVED]") and "bad" not in done and len(told) < 20
    told.clear()
    assert shown(through(by, cut("good words " * 200, [4] * 600))) == "good words " * 200 and len(told) < 40


def test_a_model_can_judge_its_own_answers_with_one_slot() -> None:
    engine = scripted(
        lambda r: "safe" if "Judge" in engine.renderer.tokenizer.decode(r.prompt) else "fine " * 150, slots=1
    )
    engine.context = 4096
    judge = {"kind": "model", "model": "scripted", "prompt": "Judge: {text}", "on": "output"}
    with TestClient(build(state_of(engine, guards=[judge], deadline=20))) as http:
        done = ask(http, max_tokens=2000)
        assert done.status_code == 200 and done.json()["choices"][0]["message"]["content"] == "fine " * 150


def test_long_phrases_are_held_back_whole() -> None:
    phrase = "one two three four five " * 20 + "six"
    text = "Well: " + phrase + " and so on. " * 60
    done = shown(through(guards({"kind": "blocklist", "words": [phrase]}), cut(text, [9] * 200)))
    assert done == "Well: "
