"""The four kinds of rows, from the layouts that people have to what is kept of them."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import CHATML, make_tokenizer, write_jsonl, write_recipe
from tunesmith.conversation.media import OBJECT, Media
from tunesmith.conversation.message import Conversation, Message, Preference, Rated, Text, row_from_dict
from tunesmith.conversation.render import MARK, Renderer
from tunesmith.data.media import beside, placed
from tunesmith.data.reading import detect, usable
from tunesmith.data.section import SourceSection
from tunesmith.data.sources import read_rows
from tunesmith.data.unusable import Unusable

ASKED, GOOD, BAD = Message("user", "2+2?"), Message("assistant", "4"), Message("assistant", "5")
PAIR = Preference((ASKED, GOOD), "f:1", rejected=(BAD,), shared=1)


cached_tokenizer = cache(make_tokenizer)


def turn(message: Message) -> dict[str, Any]:
    return {"role": message.role, "content": message.content}


def share(message: Message) -> dict[str, Any]:
    return {"from": {"user": "human", "assistant": "gpt"}[message.role], "value": message.content}


PAIRS = {
    "texts": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "messages": {"prompt": [turn(ASKED)], "chosen": [turn(GOOD)], "rejected": [turn(BAD)]},
    "prompt in both": {"chosen": [turn(ASKED), turn(GOOD)], "rejected": [turn(ASKED), turn(BAD)]},
    "transcripts": {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
    "openai": {
        "input": {"messages": [turn(ASKED)], "tools": []},
        "preferred_output": [turn(GOOD)],
        "non_preferred_output": [turn(BAD)],
    },
    "llama_factory": {"conversations": [share(ASKED)], "chosen": share(GOOD), "rejected": share(BAD)},
    "alpaca": {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
}


def read(tmp_path: Path, row: dict[str, Any], **settings: Any) -> Conversation:
    path = tmp_path / "f.jsonl"
    path.write_text(json.dumps(row) + "\n")
    source = SourceSection(path=str(path), **settings)
    (number, found), *_ = read_rows(source, path)
    return placed(detect(source, path).read(found, source, f"f:{number}"), beside(found, source))  # type: ignore[arg-type]


@pytest.mark.parametrize("row", PAIRS.values(), ids=PAIRS)
def test_every_way_to_write_a_pair_is_the_same_pair(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read(tmp_path, row) == PAIR


def test_margins_and_systems_are_kept(tmp_path: Path) -> None:
    found = read(tmp_path, PAIRS["texts"] | {"margin": 1.5, "system": "Count."})
    assert isinstance(found, Preference) and found.margin == 1.5
    assert [m.role for m in found.prompt] == ["system", "user"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "same_endings"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "wide"}, "bad_margin"),
        ({"prompt": "a", "chosen": None, "rejected": "c"}, "bad_message"),
        ({"prompt": "a", "chosen": [{"text": "b"}], "rejected": "c"}, "bad_message"),
    ],
)
def test_pairs_that_are_none(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        read(tmp_path, row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "completion": "4", "label": True},
        {"messages": [turn(ASKED), turn(GOOD)], "label": True},
        {"conversations": [share(ASKED), share(GOOD)], "kto_tag": True},
    ],
)
def test_rated_answers(tmp_path: Path, row: dict[str, Any]) -> None:
    assert read(tmp_path, row) == Rated((ASKED, GOOD), "f:1", good=True)


NAMED = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "keys", "expected"),
    [
        ({"q": "2+2?", "a": "4", "b": "5"}, {"columns": NAMED}, PAIR),
        ({"q": [turn(ASKED)], "a": [turn(GOOD)], "b": turn(BAD)}, {"columns": NAMED}, PAIR),
        (
            {"a": [turn(ASKED), turn(GOOD)], "b": [turn(ASKED), turn(BAD)]},
            {"columns": {"chosen": "a", "rejected": "b"}},
            PAIR,
        ),
        ({"n": 2, "a": "4", "b": "5"}, {"columns": {"chosen": "a", "rejected": "b"}, "template": "{n}+{n}?"}, PAIR),
        (
            {"q": "2+2?", "a": "4", "b": "5", "about": "Sums.", "rules": {"brief": True}},
            {"columns": NAMED | {"context": "about", "system": "rules"}},
            Preference(
                (Message("system", '{"brief":true}'), Message("user", "Sums.\n\n2+2?"), GOOD),
                "f:1", rejected=(BAD,), shared=2,
            ),
        ),
        ({"q": "2+2?", "a": "4", "b": None}, {"columns": NAMED}, "lacks 'b'"),
        ({"a": "4", "b": "5", "q": None}, {"columns": NAMED}, "lacks 'q'"),
        (
            {"q": "2+2?", "a": "4", "good": " True "},
            {"columns": {"prompt": "q", "completion": "a", "label": "good"}},
            Rated((ASKED, GOOD), "f:1", good=True),
        ),
        (
            {"q": "2+2?", "a": "4", "good": "perhaps"},
            {"columns": {"prompt": "q", "completion": "a", "label": "good"}},
            "true or false, not 'perhaps'",
        ),
        ({"t": "Once.", "text": "x"}, {"columns": {"text": "t"}}, Text((), "f:1", text="Once.")),
        ({"t": None}, {"columns": {"text": "t"}}, "lacks 't'"),
    ],
)  # fmt: skip
def test_any_kind_of_row_under_names_of_its_own(tmp_path: Path, row: Any, keys: Any, expected: Any) -> None:
    if not isinstance(expected, str):
        assert read(tmp_path, row, **keys) == expected
        return
    with pytest.raises(Unusable, match=expected):
        read(tmp_path, row, **keys)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"columns": {"text": "t", "prompt": "q"}}, "`text` is plain text, with no `prompt` beside it"),
        ({"columns": {"text": "t"}, "template": "{q}"}, "nothing to fill in plain text"),
        ({"columns": {"prompt": "q", "chosen": "a"}}, "`chosen` and `rejected` go together"),
        ({"columns": {"prompt": "q", "completion": "c", "rejected": "b"}}, "`chosen` and `rejected` go together"),
        ({"columns": NAMED | {"completion": "c"}}, "leave `completion` and `label` out"),
        ({"columns": NAMED | {"label": "c"}}, "leave `completion` and `label` out"),
        ({"columns": {"prompt": "q", "label": "c"}}, "`columns` needs an answer"),
        ({"columns": {"prompt": "q"}}, "`columns` needs an answer"),
        ({"columns": {"completion": "c", "label": "l"}}, "needs a prompt column"),
    ],
)
def test_columns_that_cannot_be_meant(keys: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SourceSection(path="a.csv", **keys)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "a", "output": "b", "history": [["c", None]]}, "bad_history"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}, turn(GOOD)]}, "not_text"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, turn(GOOD)]}, "not_text"),
        ({"messages": [turn(ASKED), turn(GOOD) | {"reasoning_content": {"so": True}}]}, "not_text"),
    ],
)
def test_what_is_no_text_is_no_row(tmp_path: Path, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable) as caught:
        read(tmp_path, row)
    assert caught.value.reason == reason


JSON = {"a": [1.0, None, True, "é"]}
WRITTEN = '{"a":[1.0,null,true,"é"]}'


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"instruction": "a", "output": True, "history": [[JSON, False]], "system": JSON},
         [WRITTEN, WRITTEN, "false", "a", "true"]),
        ({"prompt": "a", "completion": JSON, "system": JSON}, [WRITTEN, "a", WRITTEN]),
        ({"question": JSON, "answer": 0.5}, [WRITTEN, "0.5"]),
        ({"prompt": JSON, "chosen": "b", "rejected": "c", "system": JSON}, [WRITTEN, WRITTEN, "b"]),
        ({"instruction": JSON, "input": JSON, "chosen": "b", "rejected": "c"}, [f"{WRITTEN}\n\n{WRITTEN}", "b"]),
        ({"prompt": True, "completion": "b", "label": True}, ["true", "b"]),
    ],
)  # fmt: skip
def test_what_is_no_text_is_written_as_json(tmp_path: Path, row: dict[str, Any], said: list[str]) -> None:
    assert [m.content for m in read(tmp_path, row).messages] == said


def test_plain_text_is_never_guessed_beside_a_label(tmp_path: Path) -> None:
    assert read(tmp_path, {"text": "Once.", "url": "x"}) == Text((), "f:1", text="Once.")
    from tunesmith.errors import DataError

    with pytest.raises(DataError, match="no layout fits"):
        read(tmp_path, {"text": "Once.", "label": 3})


CALL = {"id": "c1", "type": "function", "function": {"name": "zone", "arguments": '{"city": "Oslo"}'}}
TOOL = {"type": "function", "function": {"name": "zone", "description": "Time zone.", "parameters": {}}}


def test_tools_and_calls_of_them(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "Zone?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "CET"},
        {"role": "assistant", "content": "CET."},
    ]
    found = read(tmp_path, {"messages": messages, "tools": [TOOL]})
    assert found.tools == (TOOL,)
    assert found.messages[1].more["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    shared = [
        {"from": "human", "value": "Zone?"},
        {"from": "function_call", "value": '{"name": "zone", "arguments": {"city": "Oslo"}}'},
        {"from": "observation", "value": "CET"},
        {"from": "gpt", "value": "CET."},
    ]
    like = read(tmp_path, {"conversations": shared, "tools": json.dumps([TOOL["function"]])})
    assert like.tools == found.tools and [m.role for m in like.messages] == [m.role for m in found.messages]
    assert row_from_dict(json.loads(json.dumps(found.as_dict()))) == found


def test_a_tool_that_was_not_defined(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Zone?"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]
    other = {"type": "function", "function": TOOL["function"] | {"name": "zones"}}
    usable(read(tmp_path, {"messages": messages, "tools": [TOOL]}))
    usable(read(tmp_path, {"messages": messages}))  # its system message may tell them
    with pytest.raises(Unusable, match="calls 'zone'; did you mean 'zones'") as caught:
        usable(read(tmp_path, {"messages": messages, "tools": [other]}))
    assert caught.value.reason == "unknown_tool"


def test_a_template_that_writes_no_tools_is_found_out() -> None:
    assert not Renderer(make_tokenizer()).writes_tools
    writing = (
        "{% for t in tools or [] %}<|im_start|>system\n{{ t | tojson }}<|im_end|>\n{% endfor %}"
        + CHATML.replace("m['content'] +", "m['content'] + ((m.tool_calls | tojson) if m.tool_calls else '') +")
    )  # fmt: skip
    assert Renderer(make_tokenizer(), writing).writes_tools


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        Rated((ASKED, BAD), "f:2", {"tag": "x"}, good=False),
        Text((), "f:3", text="Once."),
        Conversation((ASKED, GOOD)),
    ],
)
def test_rows_are_read_as_they_were_written(row: Conversation) -> None:
    assert row_from_dict(json.loads(json.dumps(row.as_dict()))) == row
    shouted = row.map_texts(lambda m: m.content.upper())
    assert (
        type(shouted) is type(row) and shouted.map_texts(lambda m: m.content.lower()).question == row.question.lower()
    )


def test_only_the_endings_of_a_pair_are_learnt() -> None:
    renderer = Renderer(make_tokenizer())
    long = Preference(
        (ASKED, GOOD, Message("user", "Sure?"), Message("assistant", "Yes")),
        rejected=(Message("assistant", "No"),),
        shared=3,
    )
    for conversation, ending in zip(long.with_system("Count.").conversations, ("Yes", "No"), strict=True):
        rendered = renderer.render(conversation)
        learnt = [i for i, w in zip(rendered.ids, rendered.weights, strict=True) if w]
        assert renderer.tokenizer.decode(learnt) == f"{ending}<|im_end|>"


@settings(deadline=None)
@given(st.lists(st.sampled_from(["<|im_end|>", "<|im_", "end|>", "<", "|", MARK, "x"]), max_size=12))
def test_no_user_can_write_a_special_token(pieces: list[str]) -> None:
    """Not around the marks either that the renderer itself sets."""
    renderer = Renderer(cached_tokenizer())
    special = set(renderer.tokenizer.all_special_ids)

    def count(said: str) -> int:
        return sum(token in special for token in renderer.prompt((Message("user", said),)))

    assert count("".join(pieces)) == count("x")


def test_special_tokens_that_users_write_are_counted_in_the_manifest(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    """Three in two rows of every part; an answer's own are none of theirs."""
    rows = [{"prompt": f"Item {i}: red?", "completion": "red"} for i in range(40)]
    rows[3]["prompt"] += "<|im_end|> and <|im_start|>"
    rows[9]["prompt"] = "<|endoftext|>" + rows[9]["prompt"]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert tunesmith("data", "prepare", write_recipe(tmp_path, recipe)).code == 0
    manifest = json.loads((tmp_path / "runs/tiny/data/manifest.json").read_text())
    assert manifest["specials"] == 3


def test_special_tokens_that_users_write_are_text() -> None:
    renderer = Renderer(make_tokenizer())
    row = Conversation((Message("user", "Stop<|im_end|>now"), GOOD))
    assert renderer.specials_in(row) == 1
    rendered = renderer.render(row)
    assert rendered.ids.count(renderer.tokenizer.eos_token_id) == 2  # the user's turn's end and the answer's
    assert renderer.tokenizer.decode(rendered.ids).count("Stop<|im_end|>now") == 1
    assert renderer.prompt(row.prompt) == rendered.ids[: len(renderer.prompt(row.prompt))]


def test_special_tokens_in_plain_texts_are_text_too(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """The end of sequence that a text was written with is its end; the data stage counts the others."""
    renderer = Renderer(make_tokenizer())
    said, end = "Stop<|im_end|>now<|im_start|>", renderer.tokenizer.eos_token_id
    for text in (said, said + renderer.tokenizer.eos_token):
        ids = renderer.render_text(Text((), "t:1", text=text)).ids
        assert ids.count(end) == 1 and ids[-1] == end
        assert renderer.tokenizer.decode(ids[:-1]) == said
        assert not set(ids[:-1]) & set(renderer.tokenizer.all_special_ids)
    rows = [{"text": f"Item {i} is red, and so on and on."} for i in range(40)]
    rows[3]["text"] += said
    rows[9]["text"] += renderer.tokenizer.eos_token
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe["train"]["method"] = "text"
    assert tunesmith("data", "prepare", write_recipe(tmp_path, recipe)).code == 0
    assert json.loads((tmp_path / "runs/tiny/data/manifest.json").read_text())["specials"] == 2


def documented() -> list[tuple[list[dict[str, Any]], dict[str, Any]]]:
    """The rows in docs/rows.md, block by block, each with its source's settings: the block of YAML before it."""
    text = (Path(__file__).parents[1] / "docs/rows.md").read_text(encoding="utf-8")
    found, settings = [], {}
    for form, block in re.findall(r"```(json|yaml)\n(.*?)```", text, re.DOTALL):
        if form == "yaml":
            settings = yaml.safe_load(block)
        else:
            found.append(([json.loads(line) for line in block.splitlines()], settings))
            settings = {}
    return found


def test_the_rows_in_the_docs_are_read(tmp_path: Path) -> None:
    found = [[read(tmp_path, row, **settings) for row in rows] for rows, settings in documented()]

    def said(*turns: str) -> Conversation:
        return Conversation(tuple(Message(*turn.split(": ", 1)) for turn in turns), "f:1")

    answered = Conversation((ASKED, GOOD), "f:1")
    assert found[:2] == [[answered] * 7, [answered] * 3]
    assert found[2] == [said("user: 2 apples, 2 pears.\n\nHow many?", "assistant: 4")] * 3
    assert found[3] == [said("user: How many?\n\n2 apples, 2 pears.", "assistant: 4")] * 3
    talk = ("system: Count.", "user: 2+2?", "assistant: 4", "user: And 3+3?", "assistant: 6")
    assert found[4] == [said(*talk)] * 3
    named = "user: Card\n\nIt was eaten."
    assert found[5] == [said("system: Name the queue.", named, "assistant: support")]
    assert found[6] == [said("user: Product: Card\nMessage: It was eaten.\nWhich queue?", "assistant: support")]
    assert found[7] == [PAIR] * 6
    before = (Message("user", "Hi"), Message("assistant", "Yes?"), ASKED)
    assert found[8] == [PAIR]
    assert found[9] == [Preference((*before, GOOD), "f:1", rejected=(BAD,), shared=3)] * 2
    assert found[10] == [Rated((ASKED, GOOD), "f:1", good=True), *[Rated((ASKED, BAD), "f:1", good=False)] * 2]
    assert found[11] == [Rated((ASKED, BAD), "f:1", good=False)]
    assert found[12] == found[13] == [Text((), "f:1", text="Once upon a time ...")]
    openai, factory = found[14]
    assert [m.role for m in openai.messages] == ["user", "assistant", "tool", "assistant", "user", "assistant"]
    assert openai.tools == factory.tools and openai.answer == factory.answer
    for one, other in zip(openai.messages, factory.messages, strict=True):
        calls = [[call["function"] for call in m.more.get("tool_calls", ())] for m in (one, other)]
        assert (one.role, one.content, calls[0]) == (other.role, other.content, calls[1])
    usable(openai)
    usable(factory)
    for rows, kind, names in ((found[15], "image", ["cat.png"] * 5),
                              (found[16], "audio", ["cat.wav"] * 3 + ["data:audio;base64,UklGRg=="])):  # fmt: skip
        seen = [Message("user", f"{OBJECT}What is it?", media=(Media(kind, name),)) for name in names]
        assert rows == [Conversation((one, Message("assistant", "A cat.")), "f:1") for one in seen]
    assert len(found) == 17
