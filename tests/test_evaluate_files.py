"""Files that `evaluate` names, as users have them: empty, cut short, of another kind. Each error names the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import write_recipe
from tunesmith.errors import DataError
from tunesmith.evaluate.bias import Bias, bbq_rows
from tunesmith.evaluate.human import human_labels
from tunesmith.evaluate.section import BiasSection, SuiteSection
from tunesmith.evaluate.suites import asked, task_rows

BBQ = {
    "context": "c", "question": "q", "ans0": "a", "ans1": "b", "ans2": "c", "label": 0, "context_condition": "ambig",
    "question_polarity": "neg", "answer_info": {}, "additional_metadata": {},
}  # fmt: skip


def suite(**keys: Any) -> Any:
    return lambda path: task_rows(SuiteSection(name="x", file=path.name, **keys), path.parent, 7)


def bbq(path: Path) -> Any:
    return bbq_rows(path, None, 7)


def crows(path: Path) -> Any:
    return Bias(BiasSection(crows_pairs=path.name), [], 4, path.parent, 100, 7)


def people(path: Path) -> Any:
    return human_labels(path.name, path.parent)


@pytest.mark.parametrize(
    "read, name, text, says",
    [
        (suite(), "t.jsonl", "", "t.jsonl: holds no rows"),
        (suite(), "t.jsonl", '{"query": "a"\n', "t.jsonl:1: is not JSON"),
        (suite(), "t.jsonl", "\n[1]\n", "t.jsonl:2: is no JSON object"),
        (suite(), "t.jsonl", '{"query": "a", "gold": 0}', "t.jsonl:1: lacks 'choices'"),
        (suite(), "t.jsonl", '{"query": "a", "choices": "ab", "gold": 0}', "its gold (0) is no place among"),
        (suite(), "t.jsonl", '{"query": "a", "choices": ["a", "b"], "gold": 2}', "its gold (2) is no place among"),
        (suite(), "t.jsonl", '{"query": "a", "choices": ["a", "b"], "gold": "b"}', "its gold ('b') is no place"),
        (suite(kind="numeric"), "t.jsonl", '{"question": "a"}', "lacks 'answer'"),
        (bbq, "b.jsonl", json.dumps(BBQ) + '\n{"a": 1}', "b.jsonl:2: lacks 'context', which rows of BBQ have"),
        (bbq, "b.jsonl", json.dumps(BBQ), "b.jsonl, row 1: its label is no place among ans0 to ans2, or answer_info"),
        (suite(), "t.jsonl", '{"query": "a", "choices": ["a", ""], "gold": 0}', "is no place among its choices"),
        (suite(kind="chat"), "t.jsonl", '{"turns": ["a", 1]}', "its turns are no list of texts"),
        (
            suite(kind="schema"),
            "t.jsonl",
            '{"context_options": ["a", "b"], "continuation": 1, "gold": 0}',
            "its continuation (1) is no text",
        ),
        (crows, "c.csv", "more,less\na,b\n", "c.csv:2: lacks 'sent_more'"),
        (crows, "c.csv", "", "c.csv: holds no rows"),
        (crows, "c.csv", b"sent_more\n\xff\xfe\n", "c.csv: can't be read"),
        (people, "p.jsonl", "not json", "p.jsonl:1: is not JSON"),
        (people, "p.csv", "prompt,a,b\nq,x,y\n", "p.csv:1: is no judgement"),
    ],
)
def test_what_is_wrong_with_a_file_is_told_with_its_line(
    read: Any, name: str, text: str | bytes, says: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError) as error:
        read(path)
    assert says in str(error.value), error.value


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"name": "x", "file": "a.jsonl", "template": "{query"}, "is no template"),
        ({"name": "x", "file": "a.jsonl", "shots": 5}, "shots are for the harness's own tasks"),
        ({"name": "x", "file": "a.jsonl", "kind": "choices"}, "choice"),
        ([{"name": "x", "file": "a.jsonl"}, "x"], "two suites are called 'x'"),
    ],
)
def test_suites_that_cannot_be_meant(
    keys: Any, says: str, tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    recipe["evaluate"]["suites"] = keys if isinstance(keys, list) else [keys]
    said = tunesmith("check", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 2 and says in said.json["error"]["what"], said.out


def test_a_template_that_no_row_fills_in() -> None:
    suite = SuiteSection(name="x", file="t.jsonl", template="{query:d}")
    with pytest.raises(DataError, match="its template can't be filled in"):
        asked(suite, {"query": "text"})
