"""Layouts beside and inside one another: in several sources, in one file, turns out of order, and rows that are almost
of a layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import CHATML, make_tokenizer, write_jsonl
from tests.test_media import PNG, WAV
from tests.test_rows import documented
from tunesmith.conversation.media import OBJECT
from tunesmith.conversation.message import Conversation, Preference, Text
from tunesmith.conversation.render import Renderer
from tunesmith.data.section import placeholders
from tunesmith.errors import DataError


def test_each_source_has_its_own_layout(prepared: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "chat.jsonl", [{"messages": [
        {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}])  # fmt: skip
    write_jsonl(tmp_path / "share.jsonl", [{"conversations": [
        {"from": "human", "value": "3+3?"}, {"from": "gpt", "value": "6"}]}])  # fmt: skip
    (tmp_path / "alpaca.csv").write_text("instruction,input,output\nAdd.,4 and 4,8\n")
    (tmp_path / "own.tsv").write_text("ticket\tqueue\nWhere is it?\tparcels\n")
    made = prepared(
        "chat.jsonl", {"path": "share.jsonl", "layout": "sharegpt", "system": "Count."}, "alpaca.csv",
        {"path": "own.tsv", "columns": {"completion": "queue"}, "template": "Which queue? {ticket}"},
    )  # fmt: skip
    assert made.turns() == [
        [("user", "2+2?"), ("assistant", "4")],
        [("system", "Count."), ("user", "3+3?"), ("assistant", "6")],
        [("user", "Add.\n\n4 and 4"), ("assistant", "8")],
        [("user", "Which queue? Where is it?"), ("assistant", "parcels")],
    ]
    write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    with pytest.raises(DataError, match=r"several kinds: conversation \(chat\.jsonl:1\), preference \(pairs\.jsonl:1"):
        prepared("chat.jsonl", "pairs.jsonl")


def test_rows_of_another_layout_than_their_files_are_told(prepared: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        *({"prompt": f"a{i}", "completion": "x"} for i in range(4)),
        {"question": "a", "answer": "b"},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"text": "t"},
        {"prompt": "q", "completion": "y", "messages": []},
    ]
    made = prepared(str(write_jsonl(tmp_path / "m.jsonl", rows)), max_rejected=1)
    assert [row.question for row in made.parts["train"]] == ["a0", "a1", "a2", "a3", "q"]
    told = [(row["row"], row["reason"], row["why"]) for row in made.rejected]
    assert told == [
        ("m.jsonl:5", "lacks_field", "lacks 'prompt' (it has: question, answer)"),
        ("m.jsonl:6", "lacks_field", "lacks 'prompt' (it has: messages)"),
        ("m.jsonl:7", "lacks_field", "lacks 'completion' (it has: prompt, chosen, rejected)"),
        ("m.jsonl:8", "lacks_field", "lacks 'prompt' (it has: text)"),
    ]


TURNS = {"s": ("system", "Be kind."), "u": ("user", "Hi?"), "a": ("assistant", "Yes."), "t": ("tool", "3")}
STRICT = "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception("
STRICT = f"{STRICT}'roles must alternate') }}}}{{% endif %}}{{% endfor %}}{CHATML}"


@pytest.mark.parametrize(
    ("roles", "reason", "by_strict"),
    [
        ("ua", "", ""),
        ("aua", "", "refused_by_template"),
        ("uua", "", "refused_by_template"),
        ("usa", "", "refused_by_template"),
        ("uaa", "", "refused_by_template"),
        ("uasua", "", "refused_by_template"),
        ("uata", "", "refused_by_template"),
        ("au", "ends_unanswered", "ends_unanswered"),
        ("uas", "ends_unanswered", "ends_unanswered"),
        ("uat", "ends_unanswered", "ends_unanswered"),
        ("sa", "empty_prompt", "empty_prompt"),
        ("a", "empty_prompt", "empty_prompt"),
        ("su", "no_answer", "no_answer"),
    ],
)
def test_turns_out_of_order(prepared: Any, tmp_path: Path, roles: str, reason: str, by_strict: str) -> None:
    """Kept as they stand where the model's template takes them; every answer to something is learnt."""
    said = [TURNS[role] for role in roles]
    rows = [{"messages": [{"role": r, "content": c} for r, c in said]}, {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]  # fmt: skip
    path = str(write_jsonl(tmp_path / "t.jsonl", rows))
    for renderer, expected in ((Renderer(make_tokenizer()), reason), (Renderer(make_tokenizer(STRICT)), by_strict)):
        made = prepared(path, max_rejected=1, renderer=renderer)
        assert [(row["row"], row["reason"]) for row in made.rejected] == ([("t.jsonl:1", expected)] if expected else [])
        if not expected:
            assert made.turns()[0] == said
            rendered = renderer.render(made.parts["train"][0])
            assert renderer.prompt(made.parts["train"][0].prompt)  # what evaluation asks
            learnt = [i for i, w in zip(rendered.ids, rendered.weights, strict=True) if w]
            assert renderer.tokenizer.decode(learnt) == "Yes.<|im_end|>" * roles[1:].count("a")


# ------------------------------------------------------------------ almost of a layout

LEAF = st.none() | st.booleans() | st.integers(-2, 2) | st.floats(width=16) | st.text(max_size=3) | st.just("\ud83d")
NAMES = ("role", "content", "from", "value", "type", "text", "function", "name", "arguments", "prompt", "label")
ANY = st.recursive(
    LEAF, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.sampled_from(NAMES), v, max_size=3), max_leaves=4
)


def changed(data: Any, value: Any) -> Any:
    """A JSON value of which some part, at any depth, is gone, is something else, or stands twice."""
    if not isinstance(value, dict | list) or not value or data.draw(st.integers(0, 5)) == 0:
        return data.draw(ANY)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    at, how = data.draw(st.sampled_from(keys)), data.draw(st.sampled_from(["deeper"] * 3 + ["gone", "twice"]))
    copy = value.copy()
    if how == "deeper":
        copy[at] = changed(data, value[at])
    elif how == "gone":
        del copy[at]
    elif isinstance(copy, list):
        copy.insert(at, copy[at])
    else:
        copy[data.draw(st.sampled_from(NAMES))] = copy[at]
    return copy


def leaves(value: Any) -> list[str]:
    """Every text in a JSON value."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [value] if isinstance(value, str) else [text for part in inner for text in leaves(part)]


def told(row: Conversation, raw: Any, source: dict[str, Any]) -> bool:
    """Whether all that a row says stands in what it was read from, as a text or as its JSON."""
    said = [row.text] if isinstance(row, Text) else []
    rejected = row.rejected if isinstance(row, Preference) else ()
    for message in (*row.messages, *rejected):
        said += [message.content, message.more.get("reasoning_content", "")]
    wording = [text for text, _ in placeholders(source.get("template", "")) if text]
    parts = re.compile("|".join(map(re.escape, [*wording, "\n\n", OBJECT])))  # what layouts put between texts
    known = [json.dumps(raw, ensure_ascii=False, separators=(",", ":")), *leaves(raw)]
    return all(any(part in text for text in known) for whole in said for part in parts.split(whole))


TOOLS = "{% for t in tools or [] %}{{ t | tojson }}\n{% endfor %}" + CHATML.replace(
    "m['content'] +", "m['content'] + ((m.tool_calls | tojson) if m.tool_calls else '') +"
)
BLOCKS = documented()


@pytest.fixture(scope="module")
def writes_tools() -> Renderer:
    return Renderer(make_tokenizer(TOOLS))


@pytest.mark.parametrize("block", range(len(BLOCKS)))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_almost_of_a_layout(prepared: Any, writes_tools: Renderer, tmp_path: Path, block: int, data: Any) -> None:
    """Of every layout on docs/rows.md: a row that was changed anywhere is accepted or rejected with a reason, and those
    beside it come through as they were."""
    (tmp_path / "cat.png").write_bytes(PNG)
    (tmp_path / "cat.wav").write_bytes(WAV)
    rows, source = BLOCKS[block]
    good = data.draw(st.sampled_from(rows))
    almost = [changed(data, good) for _ in range(3)]
    written = [good, good, *(row if isinstance(row, dict) else {"row": row} for row in almost), good, good]
    path = write_jsonl(tmp_path / "a.jsonl", written)
    try:
        made = prepared(source | {"path": path.name}, max_rejected=1, renderer=writes_tools, max_length=10**6)
    except DataError as error:
        assert error.what and error.where and error.fix
        return
    for row in made.parts["train"]:
        assert told(row, written[int(row.id.rpartition(":")[2]) - 1], source), row
    kept = [row.id for row in made.parts["train"]]
    assert sorted([*kept, *(row["row"] for row in made.rejected)]) == [f"a.jsonl:{n}" for n in range(1, 8)]
    assert all(row["reason"] and row["why"] for row in made.rejected)
    assert {f"a.jsonl:{n}" for n in (1, 2, 6, 7)} <= set(kept)
