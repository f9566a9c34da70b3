"""Data: every layout and format to the same conversations, each row accounted for, splits that do not leak."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import write_jsonl
from tests.prepared import Prepared
from tunesmith.conversation.render import Renderer
from tunesmith.data.reading import detect
from tunesmith.data.section import SourceSection
from tunesmith.data.sources import read_rows
from tunesmith.errors import DataError

# ------------------------------------------------------------------ layouts and formats

PAIRS = [("What is 1+1?", "2"), ("Naïve “quotes”,\nlines & 🙂?", 'say "hi",\tthen go'), ("Ça va?", "Oui, ça va.")]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format that the path's endings name."""
    suffixes = [s for s in path.suffixes if s != ".gz"]
    if suffixes[-1] == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if suffixes[-1] in (".jsonl", ".ndjson"):
        text = "".join(json.dumps(row, ensure_ascii=i % 2 == 0) + "\n\n" for i, row in enumerate(rows))
    elif suffixes[-1] == ".json":
        text = json.dumps({"version": 1, "data": rows} if "nested" in path.name else rows, ensure_ascii=False)
    else:
        out = io.StringIO()
        table = csv.DictWriter(out, list(rows[0]), delimiter="\t" if suffixes[-1] == ".tsv" else ",")
        table.writeheader()
        table.writerows(rows)
        text = out.getvalue()
    bom = "\ufeff" if "bom" in path.name else ""
    data = (bom + text).encode()
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    return path


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


LAYOUTS: dict[str, tuple[str, Callable[[str, str], dict[str, Any]], dict[str, Any]]] = {
    "chat": ("chat", chat, {}),
    "chat, text in parts": (
        "chat",
        lambda q, a: {"messages": [
            {"role": "User", "content": [{"type": "text", "text": q}]},
            {"role": "Assistant", "content": [{"type": "text", "text": a[:1]}, {"type": "text", "text": a[1:]}]}]},
        {},
    ),
    "sharegpt": (
        "sharegpt", lambda q, a: {"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]}, {},
    ),
    "alpaca": ("instruction", lambda q, a: {"instruction": q, "input": "", "output": a}, {}),
    "dolly": ("instruction", lambda q, a: {"instruction": q, "context": "", "response": a, "category": "x"}, {}),
    "prompt": ("prompt", lambda q, a: {"prompt": q, "completion": a}, {}),
    "prompt, response": ("prompt", lambda q, a: {"context": "", "prompt": q, "response": a}, {}),
    "question": ("question", lambda q, a: {"id": "1", "question": q, "answer": a}, {}),
    "columns": ("columns", lambda q, a: {"Text: said": q, "the label": a}, {
        "columns": {"prompt": "Text: said", "completion": "the label"}}),
    "template": ("columns", lambda q, a: {"a b": q, "the label": a}, {
        "columns": {"completion": "the label"}, "template": "{a b}"}),
}  # fmt: skip
FORMATS = ("jsonl", "ndjson", "json", "csv", "tsv", "parquet", "jsonl.gz", "json.gz", "csv.GZ", "bom.csv", "bom.jsonl")


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_in_every_format_gives_the_same(prepared: Any, tmp_path: Path, name: str) -> None:
    layout, shape, keys = LAYOUTS[name]
    rows = [shape(*pair) for pair in PAIRS]
    expected = [[("user", q), ("assistant", a)] for q, a in PAIRS]
    for form in (*FORMATS, "nested.json"):
        if layout in ("chat", "sharegpt") and any(f in form for f in ("csv", "tsv")):
            continue  # lists don't fit into a table's cells
        if "csv" in form and "GZ" in form:
            path = written(tmp_path / "rows.csv.gz", rows).rename(tmp_path / "rows.csv.GZ")
        else:
            path = written(tmp_path / f"rows.{form}", rows)
        source = {"path": path.name, **keys}
        assert detect(SourceSection(**source), path).name == layout
        made = prepared(source)
        assert made.turns() == expected, form
        assert made.parts["train"][0].id.startswith(f"{path.name}:")
        if layout != "columns":  # named instead of detected
            assert prepared(source | {"layout": layout}).turns() == expected


def test_row_numbers_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\r\n\n{"a": 2}\n')
    (tmp_path / "a.csv").write_text('a,b\n1,"x\ny"\n\n2,z\n"3,z\n')
    found = {p: [n for n, _ in read_rows(SourceSection(path=p), tmp_path / p)] for p in ("a.jsonl", "a.csv")}
    assert found == {"a.jsonl": [2, 4], "a.csv": [2, 5, 6]}


def test_what_goes_around_a_question(prepared: Any, tmp_path: Path) -> None:
    rows = [
        {"prompt": "Say x", "completion": {"x": [1, "é"]}, "context": "Of letters.", "system": "Be brief."},
        {"prompt": "Say y", "completion": 3, "context": None},
    ]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    answer = ("assistant", '{"x":[1,"é"]}')
    assert prepared(path, system="S").turns() == [
        [("system", "Be brief."), ("user", "Of letters.\n\nSay x"), answer],
        [("system", "S"), ("user", "Say y"), ("assistant", "3")],
    ]
    first = prepared({"path": path, "template": "{{{prompt}}} ({context})", "system": "T"}, system="S", max_rejected=1)
    assert first.turns() == [[("system", "Be brief."), ("user", "{Say x} (Of letters.)"), answer]]
    assert [r["reason"] for r in first.rejected] == ["lacks_field"]
    columns = {"prompt": "prompt", "completion": "completion", "context": "context", "system": "system"}
    assert prepared({"path": path, "columns": columns}).turns()[0][0] == ("system", "Be brief.")
    history = [{"instruction": "c", "input": "d", "output": "e", "history": [["a", "b"]], "system": "S"}]
    assert prepared(str(write_jsonl(tmp_path / "h.jsonl", history))).turns() == [
        [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c\n\nd"), ("assistant", "e")]
    ]
    for wrong in ([["a"]], ["ab"], 5, "x", [["a", None]], [[None, "b"]]):
        bad = [*history, history[0] | {"history": wrong}]
        made = prepared(str(write_jsonl(tmp_path / "h.jsonl", bad)), max_rejected=1)
        assert [r["reason"] for r in made.rejected] == ["bad_history"], wrong
    lone = tmp_path / "lone.json"
    lone.write_text(json.dumps(chat("a", "b")))
    assert prepared(str(lone)).turns() == [[("user", "a"), ("assistant", "b")]]


def test_parquet_of_other_types(prepared: Any, tmp_path: Path) -> None:
    import datetime
    import decimal

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = {
        "prompt": ["a", "b", None],
        "completion": [{"on": datetime.date(2024, 5, 6), "of": decimal.Decimal("1.50")}] * 3,
    }
    pq.write_table(pa.table(rows), tmp_path / "t.parquet")
    made = prepared("t.parquet", max_rejected=1)
    assert [t[-1][1] for t in made.turns()] == ['{"on":"2024-05-06","of":"1.50"}'] * 2
    assert made.rejected[0]["reason"] == "lacks_field" and made.rejected[0]["row"] == "t.parquet:3"
    damaged = bytearray((tmp_path / "t.parquet").read_bytes())
    for start in range(4, len(damaged) - 8, 97):
        (tmp_path / "d.parquet").write_bytes(damaged[:start] + bytes(40) + damaged[start + 40 :])
        try:
            prepared("d.parquet", max_rejected=1)
        except DataError as error:
            assert "d.parquet" in str(error) or "no row is left" in str(error)


def test_several_sources_patterns_and_variables(prepared: Any, tmp_path: Path, monkeypatch: Any) -> None:
    for name in ("a1", "a2", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": name, "completion": name}])
    (tmp_path / "odd[1].jsonl").write_text('{"prompt": "odd", "completion": "odd"}\n')
    monkeypatch.setenv("TUNESMITH_TEST_PLACE", str(tmp_path))
    made = prepared("a*.jsonl", {"path": "${TUNESMITH_TEST_PLACE}/b.jsonl", "system": "B"}, "odd[1].jsonl")
    assert [t[-1][1] for t in made.turns()] == ["a1", "a2", "b", "odd"]
    assert made.turns()[2][0] == ("system", "B")
    assert len(made.told["inputs"]) == 4


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        ({"kind": "a"}, [0, 3]),
        ({"kind": ["a", "b"]}, [0, 1, 3]),
        ({"kind": "a", "n": 4}, [3]),
        ({"n": [1, 2]}, [0, 1]),
        ({"ok": True}, [0, 2]),
        ({"ok": False, "n": 2}, [1]),
    ],
)
@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_where(prepared: Any, tmp_path: Path, where: Any, kept: list[int], form: str) -> None:
    """Numbers and yes-no mean the same whether the file has types or, as CSV, only text."""
    kinds = ["a", "b", "c", "a"]
    rows = [
        {"prompt": f"p{i}", "completion": "x", "kind": k, "n": i + 1, "ok": i % 2 == 0} for i, k in enumerate(kinds)
    ]
    path = written(tmp_path / f"w.{form}", rows)
    made = prepared({"path": path.name, "where": where})
    assert [t[0][1] for t in made.turns()] == [f"p{i}" for i in kept]
    assert made.counts["removed"] == {"where": 4 - len(kept)}


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        (["yes", "no", "yes", "no"], "label"),
        (["yes"] * 4, "text"),
        (["yes", "no", "no\nno", "yes"], "text"),
        (["a", "b", "c", "d"], "text"),
        (['{"a": 1}', "{}", '{"a": 2}', ' {"b": []}\n'], "json"),
        (['{"a": 1}', "{}", '{"a": 2}', "no"], "text"),
    ],
)
def test_what_answers_are(prepared: Any, tmp_path: Path, answers: list[str], kind: str) -> None:
    rows = [{"prompt": f"p{i}", "completion": a} for i, a in enumerate(answers)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    assert prepared(path).told["answers"]["kind"] == kind
    assert prepared(path, answers="text").told["answers"]["kind"] == "text"


# ------------------------------------------------------------------ rows that are too long


def test_over_length(prepared: Any, renderer: Renderer, tmp_path: Path) -> None:
    def turns(*lengths: int, weight: float = 1) -> dict[str, Any]:
        messages = [{"role": "system", "content": "S"}]
        for n in lengths:
            messages += [
                {"role": "user", "content": "q" + "a" * n}, {"role": "assistant", "content": "b", "weight": weight},
            ]  # fmt: skip
        return {"messages": messages}

    rows = [turns(5), turns(200), turns(40, 40, 40), turns(40, 200)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    whole = {row.id: row for row in prepared(path).parts["train"]}
    limit = 100

    def made(policy: str) -> Prepared:
        out = prepared(path, max_length=limit, over_length=policy)
        assert all(len(renderer.render(row)) <= limit for row in out.parts["train"])
        assert all(renderer.render(row).trained for row in out.parts["train"])
        return out

    with pytest.raises(DataError, match="3 of 4 rows are too long"):
        made("error")
    dropped = made("drop")
    assert [row.id for row in dropped.parts["train"]] == ["a.jsonl:1"] and dropped.counts["removed"] == {
        "over_length": 3
    }
    assert dropped.removed[0]["messages"] == whole["a.jsonl:2"].as_dict()["messages"]
    cut = made("truncate")
    assert cut.counts["removed"] == {"over_length": 1} and cut.counts["cut"] == 2  # row 3 is long in several messages
    shorter = next(row for row in cut.parts["train"] if row.id == "a.jsonl:2")
    lost = shorter.metadata["cut_characters"]
    assert shorter.answer == "b" and whole["a.jsonl:2"].question == shorter.question + "a" * lost
    # a character more would be a token too many
    assert len(renderer.render(shorter)) > limit - 3
    split = made("split")
    ids = [row.id for row in split.parts["train"]]
    assert ids == ["a.jsonl:1", *(f"a.jsonl:3#{i}" for i in range(1, len(ids)))] and len(ids) > 2
    assert split.counts["made"] == {"over_length": len(ids) - 2} and split.counts["removed"] == {"over_length": 2}
    pieces = [m.content for row in split.parts["train"][1:] for m in row.messages if m.role != "system"]
    assert pieces == [m.content for m in whole["a.jsonl:3"].messages if m.role != "system"]
    assert all(row.messages[0].content == "S" for row in split.parts["train"])
    unweighted = [turns(5), turns(50, 50)]
    unweighted[1]["messages"][2]["weight"] = 0
    path = str(write_jsonl(tmp_path / "a.jsonl", unweighted))
    assert [row.id for row in made("split").parts["train"]] == ["a.jsonl:1", "a.jsonl:2#1"]  # the other taught nothing


# ------------------------------------------------------------------ real files

REAL = [
    ("banking77/train.csv", {"columns": {"prompt": "text", "completion": "category"}}, "columns", 10003, 0, "label"),
    ("banking77/test.csv", {"columns": {"completion": "category"}, "template": "Intent of: {text}"}, "columns", 3080, 0,
     "label"),
    ("formats/litgpt/alpaca.json", {}, "instruction", 23, 0, "text"),
    ("formats/litgpt/dolly.json", {}, "instruction", 12, 0, "text"),
    ("formats/tinker/conversations.jsonl", {}, "chat", 128, 0, "text"),
    ("formats/torchtune/alpaca_tiny.json", {}, "instruction", 100, 0, "text"),
    ("formats/torchtune/chat_tiny.json", {}, "sharegpt", 1, 0, "text"),
    ("formats/torchtune/instruct_tiny.json", {}, "instruction", 2, 0, "text"),
    ("gsm8k/train.jsonl", {}, "question", 7473, 0, "text"),
    ("llama_factory/identity.json", {}, "instruction", 91, 0, "text"),
    ("llama_factory/kto_en_demo.json", {}, "rated", 300, 0, "text"),
    ("llama_factory/glaive_toolcall_en_demo.json", {}, "sharegpt", 300, 0, "text"),
    ("llama_factory/dpo_en_demo.json", {}, "preference", 300, 0, "preference"),
    ("llama_factory/c4_demo.jsonl", {}, "text", 300, 0, "none"),
    ("formats/torchtune/hh_rlhf_tiny.json", {}, "preference", 1, 0, "preference"),
    ("formats/torchtune/stack_exchange_paired_tiny.json",
     {"columns": {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}}, "columns", 25, 0,
     "preference"),
    ("hh_rlhf/harmless-base_test.jsonl.gz", {}, "preference", 2312, 4, "preference"),
    ("medical/mts_dialog_validation.csv", {"columns": {"prompt": "dialogue", "completion": "section_text"}}, "columns",
     100, 0, "text"),
    ("legal/overruling_test.tsv", {"columns": {"prompt": "text", "completion": "label"}}, "columns", 2394, 0, "label"),
    ("legal/hearsay_test.tsv", {"columns": {"prompt": "text", "completion": "label"}}, "columns", 95, 0, "label"),
    ("legal/abercrombie_train.tsv", {"columns": {"prompt": "text", "completion": "label"}}, "columns", 5, 0, "text"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "keys", "layout", "rows", "rejected", "kind"), REAL, ids=[r[0] for r in REAL])
def test_real_files(
    monkeypatch: Any,
    prepared: Any,
    shared: Path,
    file: str,
    keys: Any,
    layout: str,
    rows: int,
    rejected: Any,
    kind: str,
) -> None:
    """All their rows, as conversations whose text is the file's. (Not measured in tokens: that takes time.)"""
    monkeypatch.setattr("tunesmith.data.fit._measured", lambda row, renderer: 1)
    path = shared / file
    assert detect(SourceSection(path=str(path), **keys), path).name == layout
    made = prepared({"path": str(path), **keys}, max_rejected=1, split={"validation": 0, "test": 0})
    assert made.counts["read"] == rows and made.told["answers"]["kind"] == kind
    assert made.counts["rejected"] == rejected
    raw = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8-sig")
    if file.endswith((".json", ".jsonl", ".jsonl.gz")):
        raw = raw.replace("\\/", "/")  # JSON may write a slash as either
        for row in made.parts["train"][:50]:
            ways = (json.dumps(row.answer, ensure_ascii=ascii)[1:-1].replace("\\/", "/") for ascii in (True, False))
            assert any(way in raw for way in ways)
    else:
        assert all(row.answer.replace('"', '""') in raw or row.answer in raw for row in made.parts["train"][:50])


@pytest.mark.parametrize(
    "file",
    [
        "formats/llm_foundry_arc_easy_train.jsonl", "mt_bench/question.jsonl",
        "toxicity/davidson_labeled_data.csv",
    ],
)  # fmt: skip
def test_real_files_of_no_layout_say_their_columns(prepared: Any, shared: Path, file: str) -> None:
    with pytest.raises(DataError, match="no layout fits; its columns are: ") as caught:
        prepared(str(shared / file))
    assert file.rpartition("/")[2] in str(caught.value)


# ------------------------------------------------------------------ anything at all


def mutated(data: Any, seed_bytes: bytes) -> bytes:
    """Bytes with a few cuts, repeats and insertions."""
    raw = bytearray(seed_bytes)
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, max(len(raw) - 1, 0)))
        kind = data.draw(st.sampled_from(["set", "insert", "delete", "repeat"]))
        if kind == "set" and raw:
            raw[at] = data.draw(st.integers(0, 255))
        elif kind == "insert":
            pieces = [b'"', b"\n", b"\r", b",", b"[[", b"{", b"null", b"1e999", b"\x00", b"\xff", b"NaN"]
            halves = [b"\\ud83d", b"\\uD83D"]
            raw[at:at] = data.draw(st.sampled_from(pieces + halves) | st.binary(max_size=4))
        elif kind == "delete":
            del raw[at : at + data.draw(st.integers(1, 30))]
        else:
            raw[at:at] = raw[at : at + 40]
    return bytes(raw)


JSONL = "".join(
    json.dumps(row, ensure_ascii=False) + "\n"
    for row in (
        chat("Hi é 🙂", "Hello"), {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
        {"prompt": "a", "completion": {"x": 1}, "context": None},
        {"instruction": "a", "output": "b", "history": [["c", "d"]]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0.5}]},
    )
).encode()  # fmt: skip
CSV = 'prompt,completion,context\nWhat?,"a, b",\n"two\nlines","say ""x""",c\né🙂,z,\n'.encode()
SEEDS = {"jsonl": JSONL, "csv": CSV, "json": b"[" + JSONL.strip().replace(b"\n", b",\n") + b"]"}


@pytest.mark.parametrize("form", SEEDS)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bytes_do_more_than_a_data_error(prepared: Any, tmp_path: Path, form: str, data: Any) -> None:
    """Whatever a file holds: an error of ours, or each row that is not blank accepted or rejected with a reason."""
    path = tmp_path / f"m.{form}"
    path.write_bytes(mutated(data, SEEDS[form]))
    try:
        made = prepared(path.name, max_rejected=1)
    except DataError as error:
        assert error.where and error.fix and str(error).encode()
        return
    if form == "jsonl":
        text = path.read_bytes().decode("utf-8-sig", "surrogateescape")
        lines = [n for n, line in enumerate(io.StringIO(text, newline=""), 1) if line.strip()]
        told = [int(row.id.rpartition(":")[2]) for row in made.parts["train"]]
        told += [int(row["row"].rpartition(":")[2]) for row in made.rejected]
        assert sorted(told) == lines
    assert all(row["reason"] and row["why"] for row in made.rejected)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(st.tuples(st.text(min_size=1), st.text(min_size=1)), min_size=1, max_size=5))
def test_text_comes_through_unchanged(prepared: Any, tmp_path: Path, pairs: list[tuple[str, str]]) -> None:
    """Any text in a row is the text of its conversation, from the file to the prepared rows and back."""
    rows = [{"prompt": q, "completion": a} for q, a in pairs]
    usable = [p for p in pairs if p[0].strip() and p[1].strip()]
    for path in (written(tmp_path / "t.jsonl", rows), written(tmp_path / "t.parquet", rows)):
        try:
            made = prepared(path.name, max_rejected=1)
        except DataError:
            assert not usable
            continue
        assert made.turns() == [[("user", q), ("assistant", a)] for q, a in usable]
