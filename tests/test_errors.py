"""What bad input gets: what is wrong, where, and what to do; exit code 2; no traceback; JSON for programs."""

from __future__ import annotations

import gzip
import json
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHATML, colour_rows, make_model, write_jsonl, write_recipe
from tunesmith.runs import read_jsonl

GOOD = [json.dumps(row) for row in colour_rows(20)]
ENDLESS = CHATML.replace("<|im_end|>", "")  # a template that never writes the token that ends an answer


def assert_refused(said: Any, *parts: str) -> dict[str, Any]:
    """The error of a command that was given --json, after checking its form and that it says `parts`."""
    assert said.code == 2, said
    assert "Traceback" not in said.out + said.err
    error = said.json["error"]
    told = f"{error['where']}: {error['what']}\n{error['fix']}"
    assert error["what"] and error["where"] and error["fix"], error
    for part in parts:
        assert part in told, told
    return error


@pytest.fixture
def refuse(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> Callable[..., Any]:
    """Run a recipe, for programs and for people, and check both answers; `change` alters the recipe's keys."""

    def run(*parts: str, change: Any = None, rows: Any = None, flags: Any = (), verb: str = "train") -> Any:
        if isinstance(rows, bytes):
            (tmp_path / "rows.jsonl").write_bytes(rows)
        elif rows is not None:
            (tmp_path / "rows.jsonl").write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        if change:
            change(recipe)
        path = write_recipe(tmp_path, recipe)
        error = assert_refused(tunesmith(verb, path, *flags, "--json"), *parts)
        people = tunesmith(verb, path, *flags)
        assert people.code == 2 and "Traceback" not in people.err and (verb == "check" or not people.out)
        assert error["what"].splitlines()[0] in people.err and error["fix"] in people.err
        return error

    return run


@pytest.mark.parametrize(
    ("sets", "parts"),
    [
        (["train.epohcs=2"], ["train.epohcs: unknown key; did you mean 'epochs'?"]),
        (["train.adapter.rnk=2"], ["train.adapter.rnk: unknown key; did you mean 'rank'?"]),
        (["train.method.los_on=last"], ["did you mean 'loss_on'?"]),
        (["data.sources.0.colums={}"], ["data.sources.0.colums: unknown key; did you mean 'columns'?"]),
        (["trian={}"], ["trian: unknown key; did you mean 'train'?"]),
        (["train.epochs=many"], ["train.epochs", "number", "many"]),
        (["train.epochs=-1"], ["train.epochs", "greater than 0", "-1"]),
        (["train.epochs=[1]"], ["train.epochs", "[1]"]),
        (["train.adapter=lroa"], ["train.adapter", "did you mean 'lora'?"]),
        (["train.adapter=3"], ["train.adapter", "expected the name of one (lora"]),
        (["train.schedule=cosin"], ["train.schedule", "'cosine', 'linear', 'constant' or 'wsd'"]),
        (["data.sources=[]"], ["data.sources", "at least 1"]),
        (["data.sources.0.layout=cat"], ["data.sources.0.layout", "did you mean 'chat'?"]),
        (["data.sources.0.layout=columns"], ["data.sources.0", "columns: {prompt: ..., completion: ...}"]),
        (["data.sources.0.columns={completion: a}"], ["needs a prompt column"]),
        (["data.sources.0.template=Say {prompt"], ["data.sources.0.template"]),
        (["data.sources.0.template=Say {}"], ["data.sources.0.template", "{column}"]),
        (["data.sources.0.template=Say it"], ["data.sources.0.template", "{text}"]),
        (["data.split={validation: 0.5, test: 0.5}"], ["data.split", "together below 1"]),
        (["data.split.test=1.5"], ["data.split", "whole count"]),
        (["goal.metric=exactmatch"], ["exact_match"]),
        (["name=a/b"], ["name", "letters, digits"]),
        (["model="], ["model"]),
        (["train"], ["--set", "'train' is not key=value", "--set train.epochs=1"]),
        (["=3"], ["--set", "is not key=value"]),
        (["train.epochs=[1"], ["--set train.epochs", "is not YAML"]),
        (["data.sources.7.path=x"], ["--set data.sources.7.path=x", "there is no '7'", "counted from 0"]),
        (["name.low=3"], ["'name' holds no keys"]),
    ],
)
def test_recipe_keys(tunesmith: Any, recipe: Any, tmp_path: Path, sets: list[str], parts: list[str]) -> None:
    path = write_recipe(tmp_path, recipe)
    flags = [f"--set={s}" for s in sets]
    assert_refused(tunesmith("check", path, *flags, "--json"), *parts)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"model: [a\ntrain: {}\n", ["bad.yaml:", "is not YAML", "indentation"]),
        (b"model: a\nmodel: b\n", ["bad.yaml:2", "'model' is there twice"]),
        (b"train: {epochs: 1, epochs: 2}\n", ["bad.yaml:1", "'epochs' is there twice"]),
        (b"name: caf\xe9\n", ["bad.yaml", "is not UTF-8", "Save it as UTF-8"]),
        (b"name: \x00\n", ["bad.yaml", "is not YAML"]),
        (b"", ["bad.yaml", "no keys", "tunesmith init"]),
        (b"- a\n", ["bad.yaml", "no keys"]),
        (b"{" * 5000, ["bad.yaml"]),
        (b"? [a]\n: b\n", ["bad.yaml"]),
        (b"1: 2\nmodel: a\ndata: {sources: [x]}\n", ["bad.yaml"]),
        (b"name: x\n", ["model: is missing", "data: is missing"]),
    ],
)
def test_recipe_files(tunesmith: Any, tmp_path: Path, content: bytes, parts: list[str]) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    assert_refused(tunesmith("check", "bad.yaml", "--json"), *parts)


def test_recipe_names(tunesmith: Any, tmp_path: Path) -> None:
    assert_refused(tunesmith("check", tmp_path, "--json"), str(tmp_path), "is a folder", ".yaml")
    error = tunesmith("check", "quikstart", "--json").json["error"]
    assert "did you mean 'quickstart'?" in error["what"] and "tunesmith init" in error["fix"]
    assert_refused(tunesmith("runs", "show", "nothing", "--json"), "no run is called 'nothing'", "tunesmith run")


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        (b"", ["rows.jsonl", "holds no rows"]),
        (b"\n \n", ["rows.jsonl", "holds no rows"]),
        ("caf\xe9".encode("utf-16"), ["rows.jsonl:1", "is not JSON"]),
        ([GOOD[0], '{"prompt": "a", "completion', *GOOD], ["rows.jsonl:2", "is not JSON", "1 of 22 rows"]),
        ([*GOOD, "[1]"], ["rows.jsonl:21", "is a JSON list, not an object"]),
        ([*GOOD, '{"prompt": "a"}'], ["rows.jsonl:21", "lacks 'completion' (it has: prompt)", "max_rejected=0.05"]),
        ([*GOOD, '{"prompt": "a", "completion": ""}'], ["rows.jsonl:21", "the answer is empty"]),
        ([*GOOD, '{"prompt": " ", "completion": "b"}'], ["rows.jsonl:21", "the prompt is empty"]),
        ([*GOOD, r'{"prompt": "\ud83d", "completion": "b"}'], ["rows.jsonl:21", "half a character"]),
        ([*GOOD, '{"prompt": NaN, "completion": "b"}'], ["rows.jsonl:21", "NaN is not JSON"]),
        ([*GOOD, *['{"a": 1}'] * 7], ["7 of 27 rows", "rows.jsonl:25", "and 2 more", "max_rejected=0.26"]),
        (['{"text": "a", "label": "b"}'], ["rows.jsonl", "columns are: text, label", "columns: {prompt:"]),
    ],
)
def test_rows(refuse: Any, rows: Any, parts: list[str]) -> None:
    assert refuse(*parts, rows=rows, verb="check")
    assert refuse(*parts, rows=rows)


@pytest.mark.parametrize(
    ("messages", "why"),
    [
        ([{"role": "user", "content": "a"}], "no assistant's turn"),
        ([], "no assistant's turn"),
        ([{"role": "assistant", "content": "b"}, {"role": "user", "content": "a"}], "ends with the user's turn"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}], "weight is 0"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": -1}], "weight -1"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 1e999}], "is not JSON"),
        ([{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}], "role 'robot' is not"),
        ([{"role": "user", "content": 3}], "is int, not text"),
        ([{"role": "user"}], "must have 'role' and 'content'"),
        (["a"], "must have 'role' and 'content'"),
    ],
)
def test_messages(refuse: Any, messages: Any, why: str) -> None:
    """In one row among good ones, and in every row: with no token to learn from, nothing can be trained."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    good = [json.dumps({"messages": turns})] * 5
    if why == "is not JSON":
        why = "1e999 is larger than any number"
    assert refuse("rows.jsonl:6", why, rows=[*good, json.dumps({"messages": messages}).replace("Infinity", "1e999")])
    assert refuse(
        "no row is left to train on", "4 rows read, 4 rejected", why, "rows.jsonl:1",
        rows=[json.dumps({"messages": messages}).replace("Infinity", "1e999")] * 4,
        flags=["--set=data.max_rejected=1"],
    )  # fmt: skip


def test_rejected_rows_that_are_allowed_are_kept_aside(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    rows = [*GOOD, '{"prompt": "a"', '{"prompt": "a", "completion": ""}']
    (tmp_path / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    recipe["data"] |= {"max_rejected": 0.1, "split": {"validation": 2, "test": 2}}
    path = write_recipe(tmp_path, recipe)
    checked = tunesmith("check", path, "--json")
    assert checked.code == 0 and checked.json["error"] is None
    assert [(r["row"], r["reason"]) for r in checked.json["left_out"]] == [
        ("rows.jsonl:21", "broken_json"), ("rows.jsonl:22", "empty_answer"),
    ]  # fmt: skip
    assert tunesmith("train", path, "--json").code == 0
    aside = read_jsonl(tmp_path / "runs/tiny/data/rejected.jsonl")
    assert [row["text"] for row in aside] == rows[20:]
    checked = tunesmith("check", path, "--set=data.max_rejected=0.05", "--json")
    assert_refused(checked, "2 of 22 rows", "rows.jsonl:21")
    assert len(checked.json["left_out"]) == 2 and checked.json["counts"]["accepted"] == 20


def test_files(refuse: Any, recipe: Any, tmp_path: Path) -> None:
    def source(**keys: Any) -> Any:
        return lambda recipe: recipe["data"]["sources"].__setitem__(0, keys)

    assert refuse("data.sources.0.path", "no such file", "absent.jsonl", change=source(path="absent.jsonl"))
    assert refuse("data.sources.0.path", "is a folder", "*.jsonl", change=source(path=str(tmp_path)))
    assert refuse("names a variable that is not set", change=source(path="$NO_SUCH_FOLDER/x.jsonl"))
    (tmp_path / "rows.xyz").write_bytes(b"\x00\x01")
    assert refuse("rows.xyz", "'.xyz' are not read", "jsonl", change=source(path="rows.xyz"))
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress("\n".join(GOOD).encode())[:-30])
    assert refuse("rows.jsonl.gz", "can't be unpacked", "cut short", change=source(path="rows.jsonl.gz"))
    (tmp_path / "plain.jsonl.gz").write_bytes(b"not gzip at all")
    assert refuse("plain.jsonl.gz", "can't be unpacked", change=source(path="plain.jsonl.gz"))
    (tmp_path / "rows.json").write_text('[{"prompt": "a",\n "completion": }]')
    assert refuse("rows.json:2", "is not JSON", change=source(path="rows.json"))
    (tmp_path / "rows.json").write_bytes(b'[\n{"prompt": "\xff"}]')
    assert refuse("rows.json:2", "is not UTF-8", change=source(path="rows.json"))
    (tmp_path / "rows.json").write_text("3")
    assert refuse("rows.json", "no list of rows", change=source(path="rows.json"))
    (tmp_path / "rows.parquet").write_bytes(b"PAR1 not really PAR1")
    assert refuse("rows.parquet", "is not Parquet", change=source(path="rows.parquet"))
    (tmp_path / "rows.csv").write_bytes("pr\xf6mpt,completion\na,b\n".encode("latin-1"))
    assert refuse("rows.csv:1", "header is not UTF-8", change=source(path="rows.csv"))
    (tmp_path / "rows.csv").write_text('prompt,"completion"x\na,b\n')
    assert refuse("rows.csv:1", "header is not CSV", change=source(path="rows.csv"))
    (tmp_path / "rows.csv").write_text("prompt,prompt\na,b\n")
    assert refuse("rows.csv:1", "same name", change=source(path="rows.csv"))
    (tmp_path / "rows.csv").write_text("text,category\na,b\n")
    columns = {"prompt": "text", "completion": "categry"}
    assert refuse(
        "rows.csv", "no column 'categry'; did you mean 'category'?", "text, category",
        change=source(path="rows.csv", columns=columns),
    )  # fmt: skip
    (tmp_path / "rows.csv").write_text('prompt,completion\na,b\nc\n"d,e\nf,g\n')
    error = refuse("rows.csv:3", "1 fields where the header has 2", change=source(path="rows.csv"))
    assert "rows.csv:4: is not CSV" in error["what"]
    assert refuse("rows.jsonl:1", "no column 'kind'", change=source(path="rows.jsonl", where={"kind": "a"}))
    where = {"completion": "pink"}
    error = refuse("no row is left", "60 removed (where)", change=source(path="rows.jsonl", where=where))
    assert "rows.jsonl:1: does not meet" in error["what"]
    chat = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}]
    write_jsonl(tmp_path / "chat.jsonl", chat)
    assert refuse("chat.jsonl", "template", "layout chat", change=source(path="chat.jsonl", template="Say {x}"))
    recipe["data"]["split"] = {"validation": 50, "test": 30}
    assert refuse("no row is left", "held out for test", "data.split", change=source(path="rows.jsonl"))


def test_rows_longer_than_the_context(refuse: Any, tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    def row(i: int, *lengths: int) -> str:
        turns = [(f"{i} " + "a" * n, "red") for n in lengths]
        roles = ("user", "assistant")
        return json.dumps(
            {"messages": [{"role": r, "content": c} for t in turns for r, c in zip(roles, t, strict=True)]}
        )

    # Row 4 is one long question after a short one; row 9 is two that only fit apart.
    rows = [row(i, *{3: (2, 300), 8: (70, 70)}.get(i, (2, 2))) for i in range(12)]
    recipe["data"]["split"] = {"validation": 1, "test": 1}
    error = refuse("2 of 12 rows are too long", "rows.jsonl:4", "over_length=drop", rows=rows, verb="check")
    assert "rows.jsonl:9: has " in error["what"] and "train.max_length is 128" in error["what"]
    path = tmp_path / "tiny.yaml"
    for policy, accepted, removed, cut, left_out in (
        ("drop", 10, {"over_length": 2}, [], ["rows.jsonl:4", "rows.jsonl:9"]),
        ("truncate", 12, {}, ["rows.jsonl:4", "rows.jsonl:9"], []),
        ("split", 12, {"over_length": 1}, ["rows.jsonl:9"], ["rows.jsonl:4"]),
    ):
        said = tunesmith("check", path, f"--set=data.over_length={policy}", "--json")
        assert said.code == 0, said
        counts = said.json["counts"]
        assert counts["accepted"] == accepted == counts["train"] + 2 and counts["removed"] == removed, policy
        assert counts["read"] + sum(counts.get("made", {}).values()) == accepted + sum(removed.values())
        assert [r["row"] for r in said.json["left_out"]] == left_out
        assert [r["row"] for r in said.json["cut"]] == cut and counts.get("cut", 0) == len(cut)
        people = tunesmith("check", path, f"--set=data.over_length={policy}")
        assert all(row in people.out for row in cut + left_out)


def test_a_tokenizer_without_a_template(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    recipe["model"] = str(make_model(tmp_path / "plain", template=None))
    said = tunesmith("train", write_recipe(tmp_path, recipe))
    assert said.code == 0 and "no chat template: using the built-in 'plain' one" in said.err
    manifest = json.loads((tmp_path / "runs/tiny/data/manifest.json").read_text())
    assert manifest["renderer"]["template"] == "plain"
    shown = tunesmith("check", tmp_path / "tiny.yaml", "--json").json["shown"][0]
    assert "".join(text for text, _ in shown).startswith("User: Item")
    assert [text for text, weight in shown if weight][-1] == "<|im_end|>"


def test_templates_that_can_not_be_trained_with(refuse: Any, tmp_path: Path) -> None:
    def template(text: str) -> Any:
        return lambda recipe: recipe.__setitem__("model", {"name": name, "chat_template": text})

    name = str(make_model(tmp_path / "endless", template=ENDLESS))
    parts = ("endless", "without a token that stops", "'<|im_end|>'", "model.end_of_turn")
    assert refuse(*parts, change=lambda recipe: recipe.__setitem__("model", name))
    assert refuse("the chat template", change=template("{% for m in messages %}"))
    assert refuse("no token 'END'", "model.end_of_turn", change=lambda r: r["model"].__setitem__("end_of_turn", "END"))
    picky = CHATML.replace("{% for", "{{ raise_exception('no system role') if messages[0].role == 'system' }}{% for", 1)

    def with_system(recipe: Any) -> None:
        template(picky)(recipe)
        recipe["data"]["system"] = "Be brief."

    assert refuse("rows.jsonl:1", "60 of 60 rows", "no system role", change=with_system)


def test_models(refuse: Any, tmp_path: Path) -> None:
    def model(name: str) -> Any:
        return lambda recipe: recipe.__setitem__("model", name)

    assert refuse("model.name", "did you mean 'smollm2-135m-instruct'?", change=model("smolm2-135m-instruct"))
    assert refuse("model.name", "no model", "owner/name", change=model(str(tmp_path / "absent")))
    (tmp_path / "folder").mkdir()
    assert refuse("folder", "holds no model", "config.json", change=model(str(tmp_path / "folder")))
    (tmp_path / "x.gguf").write_bytes(b"GGUF but not really")
    assert refuse("x.gguf", "can't be read as a model", change=model(str(tmp_path / "x.gguf")))


def test_a_tokenizer_with_tokens_that_the_model_does_not_know(refuse: Any, tmp_path: Path) -> None:
    from tests.conftest import make_tokenizer

    folder, tokenizer = make_model(tmp_path / "other"), make_tokenizer()
    size = len(tokenizer)
    tokenizer.add_tokens(["colour"])
    tokenizer.save_pretrained(folder)
    parts = (
        str(folder),
        f"'colour', the tokenizer's number {size}",
        "rows.jsonl:",
        f"knows {size} tokens",
        "belongs to the model",
    )
    assert refuse(*parts, change=lambda recipe: recipe.__setitem__("model", str(folder)))


def test_no_room_on_disk(refuse: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 10, 0))
    assert refuse("needs about", "0 MiB are free", "Free some room", str(tmp_path))


def test_a_run_of_another_recipe(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    """The name is taken for another file, but not for the same file after an edit; nothing of it is lost."""
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("train", path, "--json").code == 0
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs").rglob("*") if p.is_file()}
    recipe["train"]["max_steps"] = 3
    other = write_recipe(tmp_path, recipe, "other.yaml")
    assert_refused(
        tunesmith("train", other, "--json"),
        "run 'tiny' was made by another recipe", "tiny.yaml", "differs in: train", "--set name=",
    )  # fmt: skip
    assert before == {p: p.stat().st_mtime_ns for p in before}
    assert tunesmith("train", write_recipe(tmp_path, recipe), "--json").code == 0
    assert len(read_jsonl(tmp_path / "runs/tiny/metrics.jsonl")) == 3
    assert list((tmp_path / "runs/tiny/replaced").glob("train-*/adapter"))


def test_a_second_process_on_the_same_run(refuse: Any, tmp_path: Path) -> None:
    from tunesmith.runs import Run

    with Run(tmp_path / "runs/tiny").lock():
        assert refuse("run 'tiny'", "another process", "--set name=")


def test_debug_shows_the_traceback(tunesmith: Any, recipe: Any, tmp_path: Path) -> None:
    recipe["trian"] = {}
    said = tunesmith("check", write_recipe(tmp_path, recipe), "--debug")
    assert said.code == 2
    assert "Traceback" in said.err and "RecipeError" in said.err and "did you mean 'train'?" in said.err
