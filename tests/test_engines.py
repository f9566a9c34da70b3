"""The data stage on every engine: the same rows, in the same order, and the same files beside them, byte for byte."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import write_jsonl
from tunesmith import plugins
from tunesmith.data import opening, shelf
from tunesmith.data.engines.engine import call, saved
from tunesmith.data.engines.local import LocalRunning
from tunesmith.data.ledger import Ledger
from tunesmith.data.prepare import DataInputs, prepare
from tunesmith.data.section import DataSection
from tunesmith.errors import DataError, MachineError, RecipeError
from tunesmith.recipe import build

CLEAN = {"unicode": True, "repetition": True, "length": True, "duplicates": "near", "contamination": ["test"]}
ENGINES: dict[str, Any] = {
    "processes": {"kind": "local", "processes": 2},
    "ray": "ray",
    "spark": {"kind": "spark", "master": "local[2]", "settings": {"spark.sql.shuffle.partitions": "4"}},
}
NEEDS = {"ray": "ray", "spark": "pyspark"}
JAVA = ("/usr/lib/jvm/java-17-openjdk-amd64", "/usr/lib/jvm/java-17-openjdk-arm64", "/usr/lib/jvm/default-java")


@pytest.fixture(scope="module", params=list(ENGINES))
def engine(request: Any, tmp_path_factory: Any) -> Any:
    """An engine, started once for all tests: Ray's cluster and Spark's session are reused where there is one."""
    module = NEEDS.get(request.param)
    if module and importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: pip install 'tunesmith[{request.param}]'")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "spark" and "JAVA_HOME" not in os.environ:
            home = next((home for home in JAVA if Path(home).is_dir()), None)
            if home is None:
                pytest.skip("Spark needs Java 17; JAVA_HOME is not set and Java lies in none of the usual places")
            patch.setenv("JAVA_HOME", home)
        section = DataSection(sources=["rows.jsonl"], engine=ENGINES[request.param])
        with section.engine.start(tmp_path_factory.mktemp("engine")):
            yield ENGINES[request.param]


def made(path: Path, rows: int, seed: int = 3) -> Path:
    """Made rows: broken lines, line ends of every kind, exact and near repetitions, and text to be mended."""
    draw = random.Random(seed)
    words = ["".join(draw.choice("abcdeilmnorstu") for _ in range(draw.randint(2, 8))) for _ in range(4000)]
    kept: list[dict[str, Any]] = []
    with path.open("w", encoding="utf-8", newline="") as file:
        for number in range(rows):
            chance = draw.random()
            if chance < 0.01:
                file.write(draw.choice(['{"prompt": "no end\n', "\n", '{"prompt": "", "completion": "x"}\r\n']))
                continue
            if kept and chance < 0.25:
                row = dict(draw.choice(kept))
                if chance < 0.15:
                    row["prompt"] += f" {draw.choice(words)}"
            else:
                asked, said = (" ".join(draw.choice(words) for _ in range(draw.randint(12, 40))) for _ in range(2))
                row = {"prompt": asked, "completion": said, "customer": number // 3}
                if chance < 0.4:
                    row["prompt"] = f"<p>cafÃ© &amp; {asked}</p>\r\n"
                if len(kept) < 5000:
                    kept.append(row)
            file.write(json.dumps(row, ensure_ascii=draw.random() < 0.5) + draw.choice(["\n", "\r\n", "\n"]))
    return path


def outputs(renderer: Any, folder: Path, engine: Any, *sources: Any, **keys: Any) -> dict[str, bytes]:
    """What the data stage writes, and what the manifest tells of it, on an engine."""
    target = folder / "out"
    target.mkdir(parents=True)
    section = DataSection(sources=list(sources), engine=engine, max_rejected=0.1, **keys)
    told = prepare(section, DataInputs(renderer, 10_000, 7, folder), target)
    assert sorted(path.name for path in target.iterdir() if path.name.startswith(".")) == []
    found = {path.name: path.read_bytes() for path in sorted(target.iterdir())}
    return found | {"told": json.dumps(told, sort_keys=True).encode()}


@pytest.fixture
def small_pieces(monkeypatch: Any) -> None:
    """Many pieces of few rows, so that every piece is somebody's."""
    monkeypatch.setattr(shelf, "CHUNK", 512)
    monkeypatch.setattr(opening, "SPAN", 2**17)


def same_on(engine: Any, renderer: Any, folder: Path, *sources: Any, **keys: Any) -> dict[str, bytes]:
    alone = outputs(renderer, folder / "alone", "local", *sources, **keys)
    there = outputs(renderer, folder / "there", engine, *sources, **keys)
    assert alone.keys() == there.keys()
    assert [name for name in alone if alone[name] != there[name]] == []
    return alone


def test_made_rows_come_out_the_same(engine: Any, renderer: Any, tmp_path: Path, small_pieces: None) -> None:
    file = str(made(tmp_path / "made.jsonl", 2000))
    split = {"validation": 0.1, "test": 0.1, "by": "customer"}
    files = same_on(engine, renderer, tmp_path, file, clean=CLEAN, split=split)
    counts = json.loads(files["told"])["counts"]
    assert counts["read"] > 1900 and counts["rejected"] > 3 and counts["removed"]["duplicates"] > 200
    steps = {step["step"]: step for step in json.loads(files["steps.json"])}
    assert steps["unicode"]["changed"] > 200 and len(steps["unicode"]["examples"]) == 10


EVERY = {
    "unicode": True, "markdown": True, "turns": True, "repetition": True, "length": True, "boilerplate": True,
    "duplicates": "exact", "conflicts": "report", "personal": {"action": "pseudonymise", "names": "none"},
    "secrets": "mask", "toxicity": {"above": 0.8, "action": "drop"}, "bias": True,
    "language": {"keep": ["en"], "certainty": 0.9}, "contamination": ["test", "validation"],
}  # fmt: skip
SAID = (
    "Write to anna.{}@example.com or call 212-555-01{:02}.",
    "The key is AKIAIOSFODNN7EXAM{:02}X, keep it.",
    "You are a fucking idiot, shut up bitch, number {}.",
    "The woman at window {} said that she is a nurse and was refused.",
    "Wo ist die Rechnung Nummer {}, die ich am Montag bestellt habe?",
    "Where is the bill number {} that I asked for on Monday?",
)


@pytest.mark.long  # each process loads every library
def test_every_step_comes_out_the_same(engine: Any, renderer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    """Each step finds something in these rows, and the same wherever it is done."""
    assert plugins.known("clean").keys() == EVERY.keys() | {"labels"}  # which is one classifier of all rows
    monkeypatch.setattr(shelf, "CHUNK", 40)
    bye = "\nThank you for writing to our support."
    rows = [
        {"prompt": SAID[i % 6].format(i, i % 100), "completion": f"Answer {i} is <b>that</b> of desk {i % 7}.{bye}"}
        for i in range(120)
    ]
    rows += [rows[i] | {"completion": f"No {i}.{bye}"} for i in (5, 11, 17)] + [rows[i] for i in (2, 3)]
    rows += [
        {"prompt": "Say it.", "completion": "I wait and wait. " * 9},
        {"prompt": "Long?", "completion": "a b " * 600},
    ]
    rows += [{"prompt": f"Code {i}?", "completion": f"Here it is:\n```python\nx = {i}{bye}"} for i in range(3)]
    asked = "What do I tell a customer whose parcel came to the wrong house twice in one week"
    rows += [
        {"prompt": "Say this again.", "completion": "Say this again."},
        {"prompt": f"{asked}!", "completion": "No."},
    ]
    source, tests = (str(tmp_path / name) for name in ("rows.jsonl", "tests.jsonl"))
    write_jsonl(Path(source), rows)
    write_jsonl(
        Path(tests), [{"prompt": f"{asked}?", "completion": "Sorry."}, {"prompt": "Is it?", "completion": "Yes."}]
    )
    split = {"validation": 0.1, "test": tests, "near": None}
    files = same_on(engine, renderer, tmp_path, source, clean=EVERY, split=split)
    steps = {step["step"]: step for step in json.loads(files["steps.json"])}
    idle = [name for name, s in steps.items() if not (s["changed"] or s["removed"] or s["flagged"])]
    assert idle == ["bias"] and steps["bias"]["found"]


def test_the_true_pairs_are_found(engine: Any, renderer: Any, tmp_path: Path, shared: Path, small_pieces: None) -> None:
    """MinHash's articles: every true pair and no other, on every engine."""
    folder = shared / "dedup"
    source = {"path": str(folder / "articles_1000.train"), "format": "txt"}
    none = {"validation": 0, "test": 0}
    files = same_on(engine, renderer, tmp_path, source, clean={"duplicates": "near"}, split=none, over_length="drop")
    removed = [json.loads(line) for line in files["removed.jsonl"].splitlines()]
    names = {str(n): line.split()[0] for n, line in enumerate((folder / "articles_1000.train").open(), 1)}
    found = {frozenset((names[r["row"].split(":")[1]], names[r["why"].split(":")[-1]])) for r in removed}
    assert found == {frozenset(line.split()) for line in (folder / "articles_1000.truth").open() if line.strip()}


@pytest.mark.long
def test_100_000_made_rows_come_out_the_same(engine: Any, renderer: Any, tmp_path: Path) -> None:
    file = str(made(tmp_path / "made.jsonl", 100_000))
    files = same_on(engine, renderer, tmp_path, file, clean=CLEAN)
    assert json.loads(files["told"])["counts"]["removed"]["duplicates"] > 10_000


def test_an_error_of_the_rows_is_the_same_error(engine: Any, renderer: Any, tmp_path: Path, small_pieces: None) -> None:
    """It comes from the process that met it as it is: what, where, and what to do."""
    rows = [{"prompt": f"What is {i}?", "completion": "x" * 40, "kind": "a"} for i in range(4000)]
    del rows[3000]["kind"]
    source = {"path": str(write_jsonl(tmp_path / "rows.jsonl", rows)), "where": {"kind": "a"}}
    with pytest.raises(DataError, match=r"rows.jsonl:3001, data.sources\[\].where: has no column 'kind'"):
        outputs(renderer, tmp_path / "there", engine, source)


def test_a_missing_engine_names_its_extra(renderer: Any, tmp_path: Path, monkeypatch: Any) -> None:
    file = str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}] * 30))
    for name, module in NEEDS.items():
        for part in (module, f"{module}.errors"):
            monkeypatch.setitem(sys.modules, part, None)
        with pytest.raises(MachineError, match=rf"data.engine: needs {module}") as error:
            outputs(renderer, tmp_path / name, name, file)
        assert f"tunesmith[{name}]" in str(error.value.fix)


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"data\.engine"):
        build({"name": "x", "model": {"base": "m"}, "data": {"sources": ["a.jsonl"], "engine": "dask"}})


LINES = [b'{"prompt": "a", "completion": "b"}', b"", b'{"broken', b"\xff\xfe bytes", "é".encode() * 30, b" "]


@pytest.mark.parametrize("ends", [b"\n", b"\r\n", b"\r", b"\r\r\n\n"])
def test_spans_read_what_the_whole_file_reads(tmp_path: Path, monkeypatch: Any, ends: bytes) -> None:
    from tunesmith.data.readers import read_jsonl

    draw = random.Random(5)
    path = tmp_path / "rows.jsonl"
    for start in (b"", b"\xef\xbb\xbf"):
        path.write_bytes(start + ends.join(draw.choice(LINES) for _ in range(200)))
        whole = list(read_jsonl(path))
        for size in (1, 7, 64, 1000):
            monkeypatch.setattr(opening, "SPAN", size)
            spans = opening.spans(path)
            assert [row for span in spans for row in read_jsonl(path, span)] == whole
            assert spans[0].start == 0 and spans[-1].end == path.stat().st_size


def test_rows_on_a_shelf_are_the_rows(tmp_path: Path, conversations: Callable[[int], list[Any]]) -> None:
    rows = conversations(300)
    store = shelf.Shelf(tmp_path)
    kept = shelf.joined([store.put(rows[:100]), store.put(rows[100:])], store)
    assert list(kept) == rows and [kept[i] for i in (0, 99, 100, -1)] == [rows[i] for i in (0, 99, 100, -1)]
    draw = random.Random(1)
    order = [draw.randrange(300) for _ in range(500)]
    assert list(kept[np.array(order)]) == [rows[i] for i in order]
    assert list(kept[::-1]) == rows[::-1] and list(kept[5:9] + kept[:2]) == rows[5:9] + rows[:2]
    with pytest.raises(IndexError):
        kept[300]


@pytest.fixture
def conversations() -> Callable[[int], list[Any]]:
    from tunesmith.conversation.message import Conversation, Message, Preference, Rated, Text

    def some(count: int) -> list[Any]:
        said = [
            Message("user", "é\u2028漢 \n"),
            Message("assistant", "", 0.5, {"tool_calls": [{"n": 1}]}),
        ]
        kinds = (
            lambda id: Conversation(tuple(said), id, {"columns": {"a": 1.5}}, ({"type": "function"},)),
            lambda id: Preference(tuple(said), id, rejected=(Message("assistant", "x"),), shared=1, margin=0.25),
            lambda id: Rated(tuple(said), id, good=False),
            lambda id: Text((), id, text="\x00 \x85 plain"),
        )
        return [kinds[i % 4](f"f:{i}") for i in range(count)]

    return some


def test_work_goes_out_with_its_arrays(tmp_path: Path) -> None:
    """To the last number; a process reads them where they lie."""
    for arrays in ([], [np.empty(0)], [np.arange(5), np.empty((0, 2)), np.array([[1.5, 2.5], [3.5, 4.5]]).T]):
        path = saved(Held(arrays), tmp_path)
        found = call(path, 2)
        assert len(found) == len(arrays)
        assert all((one == 2 * other).all() for one, other in zip(found, arrays, strict=True))


class Held:
    def __init__(self, arrays: list[Any]) -> None:
        self.arrays = arrays

    def __call__(self, item: int) -> list[Any]:
        return [item * array for array in self.arrays]


def test_a_process_that_ends_is_told(tmp_path: Path) -> None:
    running = LocalRunning(tmp_path, 2)
    try:
        with pytest.raises(MachineError, match="has ended"):
            list(running.map(Killed(), [1, 2, 3, 4], 4))
    finally:
        running.stop()


class Killed:
    def __call__(self, item: int) -> int:
        os._exit(9)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Twelve times the rows take a small part of what they would take as objects."""
    peaks = []
    for rows in (2_000, 24_000):
        made(tmp_path / "made.jsonl", rows)
        code = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from pathlib import Path
from tests.conftest import make_tokenizer
from tunesmith.conversation.render import Renderer
from tunesmith.data.clean.run import Cleaning
from tunesmith.data.clean.step import Around
from tunesmith.data.engines.engine import call, saved
from tunesmith.data.engines.local import LocalRunning
from tunesmith.data.ledger import Ledger
from tunesmith.data.reading import read_parts, usable
from tunesmith.data.section import DataSection
from tunesmith.data.shelf import Shelf
from tunesmith.data.sources import source_files
folder = Path({str(tmp_path)!r}) / "rows-{rows}"
folder.mkdir()
section = DataSection(sources=["made.jsonl"], clean={{"unicode": True, "duplicates": "near"}})
store, ledger = Shelf(folder), Ledger()
parts = read_parts(section, source_files(section, folder.parent), LocalRunning(), store, ledger)
around = Around(engine=LocalRunning(), scratch=folder)
left = Cleaning(section.clean, usable, ledger, store).before_split(parts, around)
assert {rows} // 2 < len(left["train"]) < {rows}
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout.split()[-1]))
    assert peaks[1] - peaks[0] < 60, peaks  # as objects, 22,000 such rows are 75 MiB, and their runs of words 40


@pytest.mark.long
def test_memory_for_keys_is_bounded_whatever_the_rows(tmp_path: Path) -> None:
    """With a small budget processes take little more for two million rows than for a few; and find the same."""
    rows, draw = 2_000_000, np.random.default_rng(3)
    keys = {f"band{i}": draw.integers(0, 2 * rows, rows) for i in range(2)}
    for name, many in (("few", 20_000), ("many", rows)):
        (tmp_path / name).mkdir()
        for start in range(0, many, many // 10):
            columns = {k: v[start : start + many // 10] for k, v in keys.items()}
            table = pa.table({"row": np.arange(start, start + many // 10)} | columns)
            pq.write_table(table, tmp_path / name / f"{start:08}.parquet", compression="none", use_dictionary=False)
    code = """
import resource, sys
sys.path[:0] = eval(sys.argv[1])
from pathlib import Path
import numpy as np
from tunesmith.data.engines import local
folder, local.KEYS_HELD = Path(sys.argv[2]), int(sys.argv[3])
running = local.LocalRunning(folder, 2)
rows = groups = 0
for found, sizes in running.groups(sorted(folder.glob("*.parquet"))):
    rows, groups = rows + int((found * np.repeat(sizes, sizes)).sum()), groups + len(sizes)
running.stop()
used = (resource.getrusage(who).ru_maxrss // 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(rows, groups, *used)
"""

    def taken(name: str, held: int) -> list[int]:
        command = [sys.executable, "-c", code, str(sys.path), str(tmp_path / name), str(held)]
        return [int(n) for n in subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()]

    few, small, large = taken("few", 2**25), taken("many", 2**25), taken("many", 2**30)
    counts = [np.unique(column, return_counts=True)[1] for column in keys.values()]
    assert small[:2] == large[:2] and small[1] == sum((c > 1).sum() for c in counts)
    assert small[2] - few[2] < 40 and small[3] - few[3] < 40, (few, small)
    assert large[3] - few[3] > 60, (few, large)  # all keys of a column in each process


def test_a_row_that_went_missing_is_never_passed_over(prepared: Any, tmp_path: Path, monkeypatch: Any) -> None:
    ledger = Ledger(read=5, made=Counter(weight=1))
    ledger.reject("f:1", "broken_json", "no", "x")
    ledger.remove(None, "f:2", "where", "no")
    ledger.balance(4)
    for accepted in (3, 5):
        with pytest.raises(AssertionError, match=f"rows went missing: 5 read, {accepted} accepted"):
            ledger.balance(accepted)
    path = str(write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"a{i}", "completion": "b"} for i in range(4)]))
    assert prepared(path).counts["accepted"] == 4
    monkeypatch.setattr("tunesmith.data.prepare.shape", lambda section, rows, seed, ledger: rows[1:])
    with pytest.raises(AssertionError, match="rows went missing: 4 read, 3 accepted"):
        prepared(path)


@pytest.mark.long
def test_a_cluster_by_its_address(renderer: Any, tmp_path: Path, small_pieces: None) -> None:
    """One that runs elsewhere is used and left running; one that is not there is told."""
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    source = made(tmp_path / "made.jsonl", 2000)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    try:
        for name in ("first", "second"):
            engine = {"kind": "ray", "address": cluster.address}
            same_on(engine, renderer, tmp_path / name, str(source), clean=CLEAN)
    finally:
        cluster.shutdown()
    with pytest.raises(MachineError, match=r"Ray can't be started or reached") as caught:
        outputs(renderer, tmp_path / "gone", {"kind": "ray", "address": cluster.address}, str(source))
    assert caught.value.where == "data.engine" and "data.engine.address" in (caught.value.fix or "")


def test_a_ledger_goes_from_process_to_process(tmp_path: Path) -> None:
    ledger, other = Ledger(), Ledger()
    other.reject("f:1", "broken_json", "no", "é\ud83d")
    other.remove(None, "f:2", "where", "x" * 100)
    for _ in range(2):
        ledger.add(other.save(tmp_path / "ledger"))
    assert len(ledger.rejected) == 2 and ledger.steps == {"where": 2} and list(tmp_path.iterdir()) == []
    assert ledger.rejected[1]["text"] == "é\ud83d" and [e["row"] for e in ledger.removed] == ["f:2", "f:2"]
