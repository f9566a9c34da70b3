"""Made rows: reproducible, with their provenance, sieved, paid for once, and never like a held-out row."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import colour_rows, write_jsonl, write_recipe
from tests.listening import Listening, Quiet
from tunesmith.data.augment.base import Seen
from tunesmith.errors import DataError, ModelError
from tunesmith.inference import endpoint


class Writer:
    """An endpoint that answers by a function of the last message, and fails so many times first."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.fails, self.status = 0, 503
        self.answer: Any = lambda text: f"Tell me, {text.lower()}"
        writer = self

        class Handler(Quiet):
            def do_POST(self) -> None:
                body = json.loads(self.read())
                assert self.path == "/v1/chat/completions"
                if writer.fails > 0:
                    writer.fails -= 1
                    self.send_error(writer.status)
                    return
                writer.asked.append(body)
                text = writer.answer(body["messages"][-1]["content"])
                reply = {"choices": [{"message": {"role": "assistant", "content": text}}],
                         "usage": {"prompt_tokens": 10, "completion_tokens": 3}}  # fmt: skip
                self.send(json.dumps(reply).encode())

        self.server = Listening(Handler)
        self.url = f"{self.server.url}/v1"


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Writer]:
    monkeypatch.setattr(endpoint, "WAITS", (0.0, 0.0))
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    made = Writer()
    yield made
    made.server.close()


def made_rows(prepared: Any) -> list[Any]:
    return [row for row in prepared.parts["train"] if "made" in row.metadata]


@pytest.mark.parametrize("kind", ["typos", "case", "noise"])
def test_variants(prepared: Any, tmp_path: Path, kind: str) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [
        {"prompt": f"Where, please, is the card {i} that I asked for?", "completion": f"a{i}", "system": "Be kind."}
        for i in range(40)]))  # fmt: skip
    keys = {"augment": [{"kind": kind, "share": 0.5}], "split": {"validation": 4, "test": 4}}
    made = prepared(path, **keys)
    new = made_rows(made)
    [told] = made.told["augment"]
    assert told["asked"] == 16 and told["made"] == len(new) == made.counts["made"]["augment"] and len(new) >= 12
    assert sum(told.get("filtered", {}).values()) == 16 - len(new)
    train = {row.id: row for row in made.parts["train"]}
    for row in new:
        origin = train[row.metadata["made"]["from"]]  # of a training row, never of a held-out one
        assert row.metadata["made"]["by"] == kind and row.id == f"{origin.id}~{kind}"
        assert row.answer == origin.answer and row.messages[0] == origin.messages[0] and row.question != origin.question
        if kind == "case":
            assert row.question.lower() == origin.question.lower()
    assert prepared(path, **keys).parts == made.parts
    assert made_rows(prepared(path, **keys, seed=8)) != new


def test_nothing_made_is_like_a_held_out_row(prepared: Any, tmp_path: Path) -> None:
    """A test question in capitals, and a training row whose capitals are the same: the variant is not taken."""
    write_jsonl(
        tmp_path / "a.jsonl", [{"prompt": f"Where is card {i}, dear bank?", "completion": "x"} for i in range(20)]
    )
    write_jsonl(tmp_path / "t.jsonl", [{"prompt": f"where is card {i} dear bank", "completion": "x"} for i in range(5)])
    split = {"validation": 0, "test": "t.jsonl", "near": None}
    made = prepared("a.jsonl", augment=[{"kind": "case", "share": 1.0}], split=split)
    assert made.told["augment"] == [{"kind": "case", "asked": 20, "made": 15, "filtered": {"held out": 5}}]
    held = Seen(row.question for row in made.parts["test"])
    assert all(held.like(row.question) < 0.8 for row in made_rows(made))


def test_paraphrases(prepared: Any, tmp_path: Path, writer: Writer) -> None:
    rows = [{"prompt": f"Where is the card {i} of mine?", "completion": "xy"[i % 2]} for i in range(10)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    way = {
        "kind": "paraphrase",
        "url": writer.url,
        "model": "m",
        "share": 1.0,
        "price": {"prompt": 2, "completion": 10},
    }
    replies = {
        0: "",
        1: "Where is the card 1 of mine",
        2: "I'm sorry, I can't.",
        3: "Where did card 99 go?",
        4: "x 4" * 90,
    }
    writer.answer = lambda text: replies.get(int(text.split()[4]), f'"Tell me which way went card {text.split()[4]}!"')
    writer.fails = 2
    made = prepared(path, augment=[way])
    assert [row.question for row in made_rows(made)] == [f"Tell me which way went card {i}!" for i in range(5, 10)]
    [told] = made.told["augment"]
    assert told["filtered"] == {"empty": 1, "unchanged": 1, "refusal": 1, "numbers": 1, "length": 1}
    assert told["tokens"] == {"prompt": 100, "completion": 30, "kept": 0} and told["cost"] == pytest.approx(0.0005)
    first = made_rows(made)[0]
    assert first.metadata["made"] == {"by": "paraphrase", "from": ["a.jsonl:6"], "model": f"{writer.url}#m"}
    assert first.answer == "y" and first.id == "a.jsonl:6~paraphrase1"
    before = len(writer.asked)
    again = prepared(path, augment=[way])
    assert again.parts == made.parts and len(writer.asked) == before == 10  # what was paid for is kept
    assert again.told["augment"][0]["tokens"]["kept"] == 130
    more = prepared(path, augment=[way | {"per_row": 2}])
    assert len(made_rows(more)) == 5  # the same words twice are taken once
    assert more.told["augment"][0]["filtered"]["alike"] == 5


def test_a_stopped_endpoint_goes_on_where_it_was(prepared: Any, tmp_path: Path, writer: Writer) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", colour_rows(12)))
    way = {"kind": "paraphrase", "url": writer.url, "model": "m", "share": 1.0}
    answers = writer.answer

    def failing(text: str) -> str:
        if len(writer.asked) > 5:
            writer.fails = 99
        return str(answers(text))

    writer.answer = failing
    with pytest.raises(DataError, match=r"gave no answer: status 503 \(3 times\)"):
        prepared(path, augment=[way])
    earlier = len(writer.asked)
    writer.fails, writer.answer = 0, answers
    made = prepared(path, augment=[way])
    assert len(writer.asked) == 12 and earlier >= 6 and len(made_rows(made)) == 12
    writer.fails, writer.status = 1, 401
    with pytest.raises(ModelError, match="OPENAI_API_KEY"):
        prepared(path, augment=[way | {"temperature": 0.1}])


def test_synthesis(prepared: Any, tmp_path: Path, writer: Writer) -> None:
    rows = [{"prompt": f"I ask about thing {i}", "completion": ("cards", "loans")[i % 2]} for i in range(20)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    pairs = [("Whose plastic is this then?", "cards"), ("Whose plastic is this, then", "cards")]
    pairs += [("Lend me ten coins", "loans"), ("Q", "boats")]
    texts = [f"Here: {json.dumps({'question': q, 'answer': a})}" for q, a in pairs]
    replies = iter([*texts, "no row"])
    lock = threading.Lock()

    def answer(_: str) -> str:
        with lock:
            return next(replies)

    writer.answer = answer
    way = {"kind": "synthesise", "url": writer.url, "model": "m", "rows": 5, "about": "a bank's desk", "examples": 3}
    made = prepared({"path": path, "tag": "mine"}, augment=[way], split={"validation": 2, "test": 2})
    [told] = made.told["augment"]
    assert told["made"] == 2 and told["filtered"] == {"no row": 1, "unknown label": 1, "alike": 1}
    new = made_rows(made)
    assert sorted(row.answer for row in new) == ["cards", "loans"]
    assert all(row.metadata["tag"] == "mine" and len(row.metadata["made"]["from"]) == 3 for row in new)
    train = {row.id for row in made.parts["train"]}
    assert all(set(row.metadata["made"]["from"]) <= train for row in new)
    request = writer.asked[0]["messages"][-1]["content"]
    assert "About: a bank's desk" in request and "one of: cards, loans" in request and request.count('"question"') == 3


def test_synthesis_by_a_schema(prepared: Any, tmp_path: Path, writer: Writer) -> None:
    rows = [{"prompt": f"Order {i}", "completion": {"n": i}} for i in range(6)]

    def answer(text: str) -> str:
        of = {"n": 1} if "Row 1." in text else {"n": "x"}
        return json.dumps({"question": f"A wholly new order {text.partition('Row ')[2]}", "answer": of})

    writer.answer = answer
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    way = {"kind": "synthesise", "url": writer.url, "model": "m", "rows": 3, "answers_like": schema, "too_alike": 1.0}
    made = prepared(str(write_jsonl(tmp_path / "a.jsonl", rows)), augment=[way])
    assert [row.answer for row in made_rows(made)] == ['{"n": 1}']
    assert made.told["augment"][0]["filtered"]["not of the schema"] == 2


def test_synthesis_by_a_schema_alone(prepared: Any, tmp_path: Path, writer: Writer) -> None:
    rows = [{"prompt": f"I ask about thing {i}", "completion": ("cards", "loans")[i % 2]} for i in range(8)]
    writer.answer = lambda text: json.dumps({"question": f"Order {text[-41:-36]} please", "answer": {"n": 1}})
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    way = {"kind": "synthesise", "url": writer.url, "model": "m", "rows": 2, "examples": 0, "too_alike": 1.0}
    way |= {"about": "orders of a shop", "answers_like": schema}
    made = prepared({"path": str(write_jsonl(tmp_path / "a.jsonl", rows)), "tag": "mine"}, augment=[way], system="Be.")
    new = made_rows(made)
    assert [row.answer for row in new] == ['{"n": 1}'] * 2 and made.told["augment"][0]["made"] == 2
    assert all(row.metadata["tag"] == "mine" and row.messages[0].content == "Be." for row in new)
    assert new[0].metadata["made"]["from"] == []
    request = writer.asked[0]["messages"][-1]["content"]
    assert "About: orders of a shop" in request and '"integer"' in request and "question and answer" in request
    assert "thing" not in request and "cards" not in request


KINDS = {
    "text": {"text": "Where is the card of mine?"},
    "preference": {"prompt": "Where is the card?", "chosen": "Here.", "rejected": "There."},
    "rated": {"prompt": "Where is the card?", "completion": "Here.", "label": True},
}


@pytest.mark.parametrize(
    ("kind", "way"),
    [
        ("text", "typos"),
        ("text", "case"),
        ("text", "paraphrase"),
        ("preference", "synthesise"),
        ("rated", "synthesise"),
    ],
)
def test_rows_that_a_way_cannot_start_from(prepared: Any, tmp_path: Path, writer: Writer, kind: str, way: str) -> None:
    """Told before anything is asked for, though the way before it could have been."""
    asking = {"url": writer.url, "model": "m"}
    first = [] if kind == "text" else [{"kind": "paraphrase", "share": 1.0} | asking]
    last = {"kind": way} | (asking if way in ("paraphrase", "synthesise") else {})
    path = str(write_jsonl(tmp_path / "a.jsonl", [KINDS[kind]] * 6))
    with pytest.raises(DataError, match=f"{way} starts from .* rows, and these are {kind} rows") as refused:
        prepared(path, augment=[*first, last])
    assert refused.value.where == f"data.augment.{len(first)}" and writer.asked == []


def test_variants_leave_both_endings_as_they_are(prepared: Any, tmp_path: Path) -> None:
    path = str(write_jsonl(tmp_path / "a.jsonl", [KINDS["preference"]] * 3))
    new = made_rows(prepared(path, augment=[{"kind": "case", "share": 1.0}]))
    assert new and all(row.question != "Where is the card?" for row in new)
    assert all((row.answer, row.rejected[0].content) == ("Here.", "There.") for row in new)


def test_the_base_model_makes_rows(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    """Through the recipe; a tiny model says nothing sensible, and every answer of it is accounted for."""
    recipe["data"] |= {"augment": [{"kind": "paraphrase", "share": 0.2, "max_tokens": 5}, "case"]}
    said = tunesmith("train", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0, said
    manifest = json.loads((tmp_path / "runs/tiny/data/manifest.json").read_text())
    asked, cased = manifest["augment"]
    assert asked["asked"] == 9 == asked["made"] + sum(asked["filtered"].values())
    assert cased["made"] >= 4 and manifest["counts"]["made"] == {"augment": asked["made"] + cased["made"]}


@pytest.mark.parametrize(
    ("way", "told"),
    [
        ({"kind": "typo"}, "did you mean 'typos'"),
        ({"kind": "paraphrase", "url": "http://x"}, "`url` and `model` go together"),
        ({"kind": "case", "rate": 1}, "rate"),
        ({"kind": "synthesise", "examples": 0, "about": "x"}, "`about` and `answers_like` must say what a row is"),
    ],
)
def test_ways_that_cannot_be_meant(tunesmith: Any, recipe: Any, tmp_path: Path, way: Any, told: str) -> None:
    recipe["data"]["augment"] = [way]
    said = tunesmith("check", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 2 and told in said.json["error"]["what"]
