"""Each metric equals its reference library's on the same inputs; what runs code or queries keeps to its limits."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import write_jsonl, write_recipe
from tests.fake_endpoint import FakeEndpoint
from tunesmith import plugins
from tunesmith.errors import DataError, RecipeError
from tunesmith.evaluate.metrics import Answers, sandbox
from tunesmith.evaluate.metrics.code import estimate

GIVEN = ["the cat sat on the mat", "a dog barked at the tall man", "", "nothing alike", "die Katze saß auf der Matte"]
RIGHT = ["the cat is on the mat", "a dog barked loudly at the man", "some", "zebra", "die Katze saß auf dem Teppich"]


def told(given: list[str], right: list[str], **more: Any) -> Answers:
    return Answers(given, right, [1.0] * len(given), [2] * len(given), **more)


def value(name: str, answers: Answers) -> float:
    metric = plugins.load("metric", name)
    return float(metric.value(metric.measure(answers).sum(0)))


@pytest.mark.parametrize("seed", range(5))
def test_labels_equal_scikit_learn(seed: int) -> None:
    from sklearn import metrics

    random = np.random.default_rng(seed)
    right = [str(x) for x in random.choice(["a", "b", "c"], 150, p=[0.6, 0.3, 0.1])]
    given = [str(x) for x in random.choice(["a", "b", "c", "none"], 150)]
    answers, labels = told(given, right), ["a", "b", "c"]
    for average in ("macro", "micro"):
        p, r, f, _ = metrics.precision_recall_fscore_support(
            right, given, labels=labels, average=average, zero_division=0
        )
        for name, expected in (("precision", p), ("recall", r), ("f1", f)):
            assert value(f"{average}_{name}", answers) == pytest.approx(expected)
    assert value("weighted_f1", answers) == pytest.approx(
        metrics.f1_score(right, given, labels=labels, average="weighted", zero_division=0)
    )
    details = plugins.load("metric", "macro_f1").details(answers)
    matrix = metrics.confusion_matrix(right, given, labels=labels)
    assert np.array(details["confusion"]["counts"])[:, :3].tolist() == matrix.tolist()
    assert details["classes"]["b"]["n"] == right.count("b")


def test_several_labels_equal_scikit_learn() -> None:
    from sklearn.metrics import f1_score
    from sklearn.preprocessing import MultiLabelBinarizer

    random = np.random.default_rng(0)
    sets = [[[c for c in "abcd" if random.random() < 0.4] for _ in range(80)] for _ in range(2)]
    answers = told([json.dumps(s) for s in sets[0]], [", ".join(s) for s in sets[1]])
    binary = MultiLabelBinarizer(classes=list("abcd"))
    got, wanted = binary.fit_transform(sets[0]), binary.fit_transform(sets[1])
    for name, average in (("multilabel_f1", "micro"), ("multilabel_macro_f1", "macro")):
        assert value(name, answers) == pytest.approx(f1_score(wanted, got, average=average, zero_division=0))
    assert value("multilabel_exact", answers) == pytest.approx(float((got == wanted).all(1).mean()))


def test_text_equals_sacrebleu_rouge_score_nltk_and_jiwer() -> None:
    import jiwer
    from nltk.translate.meteor_score import single_meteor_score
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    answers = told(GIVEN, RIGHT)
    assert value("bleu", answers) == pytest.approx(BLEU().corpus_score(GIVEN, [RIGHT]).score)
    for n in range(2, 5):  # where orders have no match, smoothing counts
        assert value("bleu", told(GIVEN[:n], RIGHT[:n])) == pytest.approx(
            BLEU().corpus_score(GIVEN[:n], [RIGHT[:n]]).score
        )
    assert plugins.load("metric", "bleu").details(answers)["signature"].startswith("nrefs:1|case:mixed")
    for name, kind in (("rouge_1", "rouge1"), ("rouge_2", "rouge2")):
        scorer = RougeScorer([kind])
        expected = np.mean([scorer.score(r, g)[kind].fmeasure for g, r in zip(GIVEN, RIGHT, strict=True)])
        assert value(name, answers) == pytest.approx(expected)
    assert value("wer", answers) == pytest.approx(jiwer.wer(RIGHT, GIVEN))
    assert value("cer", answers) == pytest.approx(jiwer.cer(RIGHT, GIVEN))

    class NoWords:
        def synsets(self, word: str) -> list[Any]:
            return []

    exact = [single_meteor_score(r.split(), g.split(), wordnet=NoWords()) for g, r in zip(GIVEN, RIGHT, strict=True)]
    assert value("meteor", answers) == pytest.approx(np.mean(exact))


def test_bertscore_equals_its_authors_library_on_a_small_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    scorer = pytest.importorskip("bert_score")
    words = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        "red",
        "or",
        "green",
        "blue",
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "is",
    ]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab_file=str(tmp_path / "vocab.txt"), model_max_length=64).save_pretrained(tmp_path)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    given, right = ["the cat sat on a mat", "red or green"], ["a cat is on the mat", "blue"]
    monkeypatch.setenv("TUNESMITH_BERTSCORE", str(tmp_path))
    _, _, expected = scorer.score(given, right, model_type=str(tmp_path), num_layers=2)
    assert value("bertscore", told(given, right)) == pytest.approx(float(expected.mean()), abs=1e-5)
    assert value("bertscore", told(["red"], ["red"])) == pytest.approx(1.0, abs=1e-5)


def test_schema_tool_calls_spans_and_numbers() -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    given = ['{"a": 1}', '{"a": "x"}', "no"]
    answers = told(given, given, metadata=[{"schema": schema}, {"schema": json.dumps(schema)}, {"schema": schema}])
    assert value("schema_valid", answers) == pytest.approx(1 / 3)
    with pytest.raises(DataError, match="schema_valid needs 'schema'"):
        value("schema_valid", told(given, given))

    call = '{"name": "weather", "arguments": {"city": "Bern", "days": 2}}'
    other = '{"name": "weather", "arguments": "{\\"days\\": 2, \\"city\\": \\"Bern\\"}"}'
    wrong = '{"name": "weather", "arguments": {"city": "Basel", "days": 2}}'
    pairs = [(f"<tool_call>\n{other}\n</tool_call>", call), (wrong, call), ("no call", call), ("hello", "hello")]
    answers = told([g for g, _ in pairs], [r for _, r in pairs])
    assert value("tool_call", answers) == pytest.approx(2 / 4)
    assert value("tool_name", answers) == pytest.approx(3 / 4)

    right = ['[{"text": "Bern", "label": "LOC"}, {"text": "Ada", "label": "PER"}]', '{"LOC": ["Rome"]}']
    given = ["LOC: Bern\nPER: Bob", '[{"text": "Rome", "type": "LOC"}]']
    assert value("span_f1", told(given, right)) == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))

    right = ["so it is 3.\n#### 1,234", "#### 5", "#### -2.5", "#### 7"]
    given = ["The answer is 1234.", "#### 6 and 5 apples", "-2.50", "nothing"]
    assert value("numeric", told(given, right)) == pytest.approx(2 / 4)


DATABASE = "CREATE TABLE pets(name TEXT, age INTEGER);\nINSERT INTO pets VALUES ('Rex', 3), ('Mia', 5), ('Tom', 5);"


def test_sql_by_execution(tmp_path: Path) -> None:
    right = ["SELECT name FROM pets WHERE age = 5", "SELECT name FROM pets ORDER BY age DESC, name", "SELECT 1"]
    given = ["```sql\nSELECT name FROM pets WHERE age > 4 ORDER BY name DESC;\n```", "SELECT name FROM pets", "SELEC"]
    file = tmp_path / "pets.db"
    with sqlite3.connect(file) as db:
        db.executescript(DATABASE)
    answers = told(given, right, metadata=[{"database": DATABASE}, {"database": str(file)}, {"database": DATABASE}])
    assert value("sql", answers) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    "query",
    [
        "DELETE FROM pets",
        "DROP TABLE pets",
        "ATTACH DATABASE '/tmp/x.db' AS x",
        "PRAGMA writable_schema = 1",
        "WITH RECURSIVE c(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c) SELECT n FROM c",
        "SELECT hex(zeroblob(2000000))",
    ],
)
def test_queries_only_read_and_end(query: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith.evaluate.metrics import sql

    monkeypatch.setattr(sql, "SECONDS", 0.3)
    with sql.opened(DATABASE) as db:
        assert sql.result(db, query) is None
        assert sql.result(db, "SELECT count(*) FROM pets") == [(3,)]


def test_databases_as_rows_have_them() -> None:
    long = "CREATE TABLE pets (name TEXT);" + "".join(f"INSERT INTO pets VALUES ('{i}');" for i in range(20))
    assert 300 < len(long) < 1000  # one line, longer than a file's name can be
    answers = told(["SELECT count(*) FROM pets"], ["SELECT 20"], metadata=[{"database": long}])
    assert value("sql", answers) == 1
    with pytest.raises(DataError, match="'5' is no database"):
        value("sql", told(["SELECT 1"], ["SELECT 1"], metadata=[{"database": 5}]))


@pytest.mark.parametrize("schema", ["not JSON", "[" * 5000, '{"type": "nonsense"}'])
def test_what_is_no_schema(schema: str) -> None:
    with pytest.raises(DataError, match="is not a JSON schema"):
        value("schema_valid", told(["{}"], ["{}"], metadata=[{"schema": schema}]))


@pytest.mark.parametrize(
    "body, what",
    [
        ("def f(answer, reference, row):\n    raise SystemExit(0)", "failed on an answer (SystemExit: 0)"),
        ("def f(answer, reference, row):\n    return 1e308", "failed on an answer (ValueError: it gave 1e+308)"),
        ("def f(answer, reference, row):\n    return float('nan')", "failed on an answer (ValueError: it gave nan)"),
        ("import sys; sys.exit(0)", "can't be loaded (SystemExit: 0)"),
    ],
)
def test_a_function_that_ends_the_program_or_gives_no_number_is_an_error(
    body: str, what: str, tunesmith: Any, tmp_path: Path
) -> None:
    (tmp_path / "own.py").write_text(body)
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"q {i}", "completion": "x"} for i in range(8)])
    with FakeEndpoint(lambda m: "a") as there:
        told = ("--model", f"{there.url}#a", "--against", f"{there.url}#b", "--data", data, "--json")
        said = tunesmith("evaluate", *told, "--set", "evaluate.metrics=[own.py:f]")
    assert said.code == 2 and what in said.json["error"]["what"], said.out


def test_choices_that_are_no_list(tunesmith: Any, tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"q {i}", "completion": "yes", "choices": "yes, no"} for i in range(8)]
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    said = tunesmith(
        "evaluate", "--model", tiny_model, "--against", tiny_model, "--data", data, "--json",
        "--set", "data.sources.0.keep=[choices]", "--set", "evaluate.metrics=[choice_accuracy]",
    )  # fmt: skip
    assert said.code == 2 and "are no list" in said.json["error"]["what"], said.out
    assert said.json["error"]["where"] == "rows.jsonl:1"


def test_pass_at_k_runs_the_answers() -> None:
    good, bad = "```python\ndef add(a, b):\n    return a + b\n```", "def add(a, b):\n    return a - b"
    tests = {"tests": "assert add(2, 3) == 5"}
    rounds = [[good, bad], [bad, bad]]
    answers = told(rounds[0], ["", ""], metadata=[tests, tests], samples=rounds)
    assert value("pass_at_1", answers) == pytest.approx((0.5 + 0) / 2)
    with pytest.raises(RecipeError, match="pass_at_5 needs 5 answers"):
        value("pass_at_5", answers)
    row = {"prompt": "def add(a, b):\n", "entry_point": "add", "test": "def check(f):\n    assert f(1, 1) == 2\n"}
    assert value("pass_at_1", told(["    return a + b"], [""], metadata=[row])) == 1.0
    # Chen et al. 2021, appendix: 1 - prod(1 - k / arange(n - c + 1, n + 1))
    for n, c, k in ((10, 3, 5), (20, 1, 10), (5, 0, 1), (5, 5, 5)):
        expected = 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))
        assert estimate(n, c, k) == pytest.approx(expected)


@pytest.mark.parametrize(
    "code, why",
    [
        ("import socket; socket.socket()", "PermissionError"),
        ("import os; os.fork()", "PermissionError"),
        ("import subprocess; subprocess.run(['ls'])", "PermissionError"),
        ("open('/tmp/somewhere-else', 'w')", "PermissionError"),
        ("import os; os.remove('/etc/hostname')", "PermissionError"),
        ("x = [0] * 10**9", "MemoryError"),
        ("open('x', 'w').write('a' * 3_000_000)", "too large"),
        ("while True: pass", "stopped by SIG|longer than"),
        ("assert False, 'wrong'", "wrong"),
    ],
)
def test_the_sandbox_holds(code: str, why: str) -> None:
    import re

    found = sandbox.run(code, seconds=1)
    assert not found.passed and re.search(why, found.why)


def test_the_sandbox_lets_plain_programs_pass() -> None:
    assert sandbox.run("import math, json, collections\nopen('x', 'w').write('a')\nassert math.gcd(4, 6) == 2").passed


def test_the_kernel_refuses_sockets_even_without_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    import platform
    import sys

    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("seccomp is Linux's")
    monkeypatch.setattr(sandbox, "GUARD", sandbox.GUARD.replace("sys.addaudithook(hook)", "assert shut"))
    assert "Operation not permitted" in sandbox.run("import socket; socket.socket()").why
    assert "Operation not permitted" in sandbox.run("import os; os.execv('/bin/ls', ['ls'])").why


def test_choices_and_calibration() -> None:
    chances = [[0.7, 0.2, 0.1], [0.1, 0.6, 0.3], [0.5, 0.4, 0.1], [0.2, 0.2, 0.6]]
    names = ["a", "bb", "cccc"]
    choices = [[(name, -float(np.log(p))) for name, p in zip(names, row, strict=True)] for row in chances]
    answers = told([""] * 4, ["a", "cccc", "bb", "cccc"], choices=choices)
    assert value("choice_accuracy", answers) == pytest.approx(2 / 4)
    best = [int(np.argmax([np.log(p) / len(n) for p, n in zip(row, names, strict=True)])) for row in chances]
    hits = np.mean(np.array(best) == [0, 2, 1, 2])
    assert value("choice_accuracy_norm", answers) == pytest.approx(hits)
    confidence, hit = np.array([0.7, 0.6, 0.5, 0.6]), np.array([1, 0, 0, 1])
    bins = np.ceil(confidence * 15)
    expected = sum(abs(confidence[bins == b].sum() - hit[bins == b].sum()) for b in set(bins)) / 4
    assert value("ece", answers) == pytest.approx(expected)


def test_bits() -> None:
    answers = Answers(["x", "y"], ["ab", "é"], [2.0, 4.0], [1, 3])
    assert value("bits_per_token", answers) == pytest.approx(6 / np.log(2) / 4)
    assert value("bits_per_byte", answers) == pytest.approx(6 / np.log(2) / 4)


def test_a_function_of_ones_own_and_columns_kept(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(answer, reference, row):\n    return len(answer) <= row['most']\n")
    rows = [
        {"prompt": f"Item {i} is {c}.", "completion": c, "most": 9, "team": "ab"[i % 2]}
        for i, c in enumerate(["red", "blue"] * 30)
    ]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    sources = [{"path": str(source), "keep": ["most", "team"]}]
    recipe["data"] = {"sources": sources, "split": {"validation": 6, "test": 24}}
    recipe["evaluate"] |= {"metrics": ["accuracy", "mine.py:short"], "seeds": 2, "alone": 2}
    path = write_recipe(tmp_path, recipe)
    said = tunesmith("run", path, "--json")
    assert said.code == 0, said.out
    card = said.json["scorecard"]
    lines = [json.loads(x) for x in (tmp_path / "runs/tiny/evaluate/answers.jsonl").read_text().splitlines()]
    given = [s for line in lines for s in line["tuned"]["samples"]]
    assert len(given) == 48 and card["metrics"]["short"]["n"] == 24
    assert card["metrics"]["short"]["tuned"]["value"] == pytest.approx(np.mean([len(a) <= 9 for a in given]))
    assert {"a", "b"} == {s["value"] for s in card["slices"] if s["by"] == "team"}
    gaps = [s["difference"]["value"] for s in card["slices"]]
    assert gaps == sorted(gaps)
    assert card["latency"]["p95"]["tuned"]["value"] > 0 and card["latency"]["changed_by_batching"]["n"] == 2
    speed = card["latency"]["tokens_per_second"]
    assert all(speed[side]["value"] > 0 for side in ("baseline", "tuned")) and speed["n"] == 2

    (tmp_path / "mine.py").write_text("def short(answer, reference, row):\n    raise ValueError('no')\n")
    said = tunesmith("evaluate", path, "--json")
    assert said.code == 2 and "failed on an answer (ValueError: no)" in said.json["error"]["what"]
    (tmp_path / "mine.py").write_text("def short(answer, reference, row):\n    return float('nan')\n")
    said = tunesmith("evaluate", path, "--json")
    assert said.code == 2 and "failed on an answer (ValueError: it gave nan)" in said.json["error"]["what"]
    (tmp_path / "mine.py").write_text("def accuracy(answer, reference, row):\n    return 1\n")
    said = tunesmith("evaluate", path, "--set", "evaluate.metrics=[accuracy, mine.py:accuracy]", "--json")
    assert said.code == 2 and "two metrics are called 'accuracy'" in said.json["error"]["what"]
    said = tunesmith("evaluate", path, "--set", "evaluate.metrics=[gone.py:x:]")
    assert said.code == 2 and "gone.py:x:" in said.err  # a name is shown as it is written
    said = tunesmith("evaluate", path, "--set", "evaluate.metrics=[mine.py:shrt]", "--json")
    assert said.code == 2 and "has no function 'shrt'" in said.json["error"]["what"]


def test_one_schema_for_all_answers(tunesmith: Any, tiny_model: Path, tmp_path: Path) -> None:
    schema = {"type": "object", "required": ["a"], "properties": {"a": {"type": "integer"}}}
    (tmp_path / "answer.json").write_text(json.dumps(schema))
    data = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"q {i}", "completion": '{"a": 1}'} for i in range(8)])
    with FakeEndpoint(lambda m: '{"a": 2}') as good, FakeEndpoint(lambda m: '{"a": "x"}') as bad:
        told = ("evaluate", "--model", f"{good.url}#g", "--against", f"{bad.url}#b", "--data", data, "--json")
        said = tunesmith(*told, "--set", "evaluate.json_schema=answer.json", "--set", "gate=[schema_valid.low > 0.5]")
        assert said.code == 0, said.out
        score = said.json["metrics"]["schema_valid"]
        assert score["tuned"]["value"] == 1 and score["baseline"]["value"] == 0
        (tmp_path / "answer.json").write_text("{")
        said = tunesmith(*told, "--set", "evaluate.json_schema=answer.json")
        assert said.code == 2 and "is not JSON" in said.json["error"]["what"]
