"""Labels from people and rules: figures by those who define them, and nothing left out in silence."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import write_jsonl
from tests.sources import task
from tests.test_errors import assert_refused
from tunesmith.agreement import fleiss
from tunesmith.data.labels.agreement import adjudicate, agreement
from tunesmith.data.labels.judgements import Judgement, read_judgements
from tunesmith.runs import read_jsonl

# Krippendorff's own example (Computing Krippendorff's Alpha-Reliability, 2011, section C): alpha 0.743 nominal,
# 0.815 ordinal, 0.849 interval.
TABLE = [
    "1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 .",
]  # fmt: skip
EXAMPLE = [
    {"item": f"u{unit}", "annotator": who, "label": label}
    for who, line in zip("ABCD", TABLE, strict=True)
    for unit, label in enumerate(line.split(), 1)
    if label != "."
]


@pytest.mark.parametrize(("level", "alpha"), [("nominal", 0.743), ("ordinal", 0.815), ("interval", 0.849)])
def test_krippendorffs_own_example(tunesmith: Any, tmp_path: Path, level: str, alpha: float) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", EXAMPLE)
    said = tunesmith("data", "agreement", path, "--level", level, "--json").json
    assert said["krippendorff"]["alpha"] == pytest.approx(alpha, abs=5e-4)
    low, high = said["krippendorff"]["interval"]
    assert low < alpha < high
    counts = [said[key] for key in ("items", "items judged by two or more", "annotators", "judgements")]
    assert counts == [12, 11, 4, 41]
    assert said["disagreements"][0]["item"] == "u6" and len(said["disagreements"]) == 3


def test_fleiss_own_example() -> None:
    """The worked example of ten items and fourteen raters that texts on his kappa share: 0.210."""
    counts = [
        (0, 0, 0, 0, 14), (0, 2, 6, 4, 2), (0, 0, 3, 5, 6), (0, 3, 9, 2, 0), (2, 2, 8, 1, 1), (7, 7, 0, 0, 0),
        (3, 2, 6, 3, 0), (2, 5, 3, 2, 2), (6, 5, 2, 1, 0), (0, 2, 2, 3, 7),
    ]  # fmt: skip
    judgements = []
    for i, row in enumerate(counts):
        labels = [str(c) for c, n in enumerate(row) for _ in range(n)]
        judgements += [Judgement(f"i{i}", f"p{j}", label) for j, label in enumerate(labels)]
    found = agreement(judgements)["fleiss"]
    assert (found["kappa"], found["items"], found["raters"]) == (pytest.approx(0.2099, abs=1e-4), 10, 14)
    assert found["interval"][0] < 0.2099 < found["interval"][1]


def test_fleiss_is_statsmodels() -> None:
    from statsmodels.stats.inter_rater import fleiss_kappa

    random = np.random.default_rng(4)
    for _ in range(5):
        counts = random.multinomial(5, [0.6, 0.3, 0.1], 40)
        found = fleiss(counts.astype(float))
        assert found and found["value"] == pytest.approx(fleiss_kappa(counts)) and found["n"] == 40
    assert fleiss(np.array([[3.0, 0.0]] * 8)) is None  # nothing could have differed


def test_cohen_is_scikit_learns() -> None:
    from sklearn.metrics import cohen_kappa_score

    random = np.random.default_rng(0)
    truth = random.integers(0, 3, 60)
    said = {who: np.where(random.random(60) < 0.7, truth, random.integers(0, 3, 60)) for who in "ab"}
    judgements = [Judgement(str(i), who, str(said[who][i])) for who in "ab" for i in range(60)]
    [pair] = agreement(judgements)["cohen"]["pairs"]
    assert pair["interval"][0] < pair["kappa"] < pair["interval"][1] and "needs" not in pair
    assert pair["kappa"] == round(cohen_kappa_score(said["a"], said["b"]), 4) and pair["items"] == 60


def test_dawid_skene_knows_whom_to_trust() -> None:
    """Two careful annotators against three careless ones who outvote them: the truth is found again."""
    random = np.random.default_rng(1)
    truth = random.integers(0, 2, 200)
    skill = {"a": 0.97, "b": 0.95, "c": 0.6, "d": 0.55, "e": 0.55}
    judgements = [
        Judgement(str(i), who, "ny"[t if random.random() < p else 1 - t])
        for i, t in enumerate(truth)
        for who, p in skill.items()
    ]  # fmt: skip
    right = {
        how: sum(row["label"] == "ny"[truth[int(row["item"])]] for row in adjudicate(judgements, how))  # type: ignore[arg-type]
        for how in ("majority", "dawid_skene")
    }
    assert right["dawid_skene"] >= 188 > right["majority"]
    ties = adjudicate([Judgement("1", "a", "x"), Judgement("1", "b", "y"), Judgement("2", "a", "x")], "majority")
    assert [row["label"] for row in ties] == [None, "x"] and ties[0]["votes"] == {"x": 1, "y": 1}


def test_label_studio_there_and_back(tunesmith: Any, tmp_path: Path) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [{"text": "a"}, {"text": "b é"}])
    assert tunesmith("data", "tasks", tmp_path / "rows.jsonl", "--out", tmp_path / "t.json", "--json").json["rows"] == 2
    assert json.loads((tmp_path / "t.json").read_text()) == [{"data": {"text": "a"}}, {"data": {"text": "b é"}}]
    export = [task(1, "a", "good", "good", "bad"), task(2, "b é", "bad", "bad", "bad"), task(3, "c", "good")]
    (tmp_path / "export.json").write_text(json.dumps(export))
    out = tmp_path / "labels.jsonl"
    said = tunesmith("data", "agreement", tmp_path / "export.json", "--adjudicate", "majority", "--out", out)
    assert said.code == 0 and "Krippendorff" in said.out
    assert [(r["item"], r["label"]) for r in read_jsonl(out)] == [("1", "good"), ("2", "bad"), ("3", "good")]
    (tmp_path / "export.json").write_text(json.dumps([*export, {"id": 4, "text": "JSON-MIN"}]))
    said = tunesmith("data", "agreement", tmp_path / "export.json", "--json")
    assert_refused(said, "has no `data` and `annotations`", "export.json:4")


def test_a_wide_export_of_the_real_world(shared: Path) -> None:
    """BBQ's validation: five questions in each of 350 rows. The majority finds what its authors meant."""
    path = shared / "annotators/bbq_mturk_validations_finalval.csv"
    judgements = read_judgements(path, "q{}_uid", "anon_id", "Answer.q{}")
    assert len(judgements) == 1750
    found = agreement(judgements)
    assert 0.5 < found["krippendorff"]["alpha"] < 1 and found["items"] == len({j.item for j in judgements})
    gold = {j.item: f"ans_{j.label}" for j in read_judgements(path, "q{}_uid", "anon_id", "q{}_label")}
    rows = adjudicate(judgements, "dawid_skene")
    assert np.mean([row["label"] == gold[row["item"]] for row in rows]) > 0.9


def test_lists_of_people_and_what_each_said(tunesmith: Any, tmp_path: Path) -> None:
    rows = [
        {"item": "a", "who": ["p", "q", "r"], "said": [["x"], ["x"], ["y", "z"]]},
        {"item": "b", "who": "['p', 'q']", "said": '["x", ""]'},
        {"item": "c", "who": "p", "said": "[sic] x"},
    ]
    path = write_jsonl(tmp_path / "l.jsonl", rows)
    found = [tuple(j) for j in read_judgements(path, "item", "who", "said")]
    assert found == [("a", "p", "x"), ("a", "q", "x"), ("a", "r", "y, z"), ("b", "p", "x"), ("c", "p", "[sic] x")]
    write_jsonl(path, [{"item": "a", "who": "['p']", "said": "['x', 'y']"}])
    said = tunesmith("data", "agreement", path, "--annotator", "who", "--label", "said", "--json")
    assert_refused(said, "names 1 annotators in 'who' and 2 labels in 'said'", "l.jsonl:1")


def test_lists_of_the_real_world(shared: Path) -> None:
    """CrowS-Pairs: five people's kinds of bias for each pair. Its own label is most often the majority's."""
    path = shared / "bias/crows_pairs_anonymized.csv"
    judgements = read_judgements(path, "sent_more", "anon_annotators", "annotations")
    found = agreement(judgements)
    assert found["items judged by two or more"] > 1400 and found["judgements"] > 6800
    assert 0.4 < found["krippendorff"]["alpha"] < 1 and "race-color" in found["labels"]
    with path.open(encoding="utf-8", newline="") as file:
        own = {row["sent_more"]: row["bias_type"] for row in csv.DictReader(file)}
    rows = [row for row in adjudicate(judgements, "majority") if row["label"] is not None]
    assert np.mean([own[row["item"]] == row["label"] for row in rows]) > 0.8


def test_what_agreement_refuses(tunesmith: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", EXAMPLE)
    for arguments, told in (
        (["--item", "itm"], "did you mean 'item'"), (["--level", "ordnal"], "did you mean 'ordinal'"),
        (["--adjudicate", "vote"], "majority"), (["--label", "annotator", "--level", "interval"], "compares numbers"),
    ):  # fmt: skip
        assert_refused(tunesmith("data", "agreement", path, *arguments, "--json"), told)
    write_jsonl(tmp_path / "b.jsonl", EXAMPLE[:3])
    assert_refused(tunesmith("data", "agreement", tmp_path / "b.jsonl", "--json"), "no item was judged by two people")
    assert_refused(tunesmith("data", "agreement", tmp_path / "absent", "--json"), "no such file")


RULES = """
from collections import Counter as _Counter

def card(row):
    return "cards" if "card" in row["text"] else None

def loan(row):
    return "loans" if "loan" in row["text"] else None

def length(row):
    return "loans" if len(row["text"]) % 2 else "cards"

def hopeless(row):
    return row["absent"]

def _helper(row):
    return "never"
"""


def test_rules_vote_and_are_weighed(tunesmith: Any, tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    rows = []
    for i in range(300):
        kind = ("cards", "loans")[int(random.integers(2))]
        words = "about my " + (kind[:-1] if random.random() < 0.8 else "thing") + "!" * int(random.integers(1, 4))
        rows.append({"n": i, "text": words, "kind": kind if i < 200 else None})
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    with path.open("a") as more:
        more.write("{broken\n")
    (tmp_path / "rules.py").write_text(RULES)
    out = tmp_path / "out.jsonl"
    said = tunesmith("data", "label", tmp_path / "rules.py", path, "--truth", "kind", "--out", out, "--json").json
    rules = {rule["rule"]: rule for rule in said["rules"]}
    assert list(rules) == ["card", "loan", "length", "hopeless"]
    assert said["model"] == "snorkel's label model" and said["broken"][0][0] == 301
    carded = [row for row in rows if "card" in row["text"]]
    assert rules["card"]["coverage"] == round(len(carded) / 300, 4) and rules["card"]["accuracy"] == 1.0
    assert rules["length"]["coverage"] == 1.0 and rules["length"]["accuracy"] < 0.7
    assert rules["length"]["overlap"] == round(rules["card"]["coverage"] + rules["loan"]["coverage"], 4)
    assert rules["hopeless"]["coverage"] == 0 and rules["hopeless"]["errors"].startswith("300 (KeyError")
    assert said["accuracy"] > rules["length"]["accuracy"]
    labelled = read_jsonl(out)
    assert len(labelled) + len(said["unlabelled"]) == 300
    assert all(0.5 <= row["label_confidence"] <= 1 for row in labelled)


def test_rules_are_summed_as_snorkel_sums_them(tmp_path: Path) -> None:
    from snorkel.labeling import LFAnalysis

    from tunesmith.data.labels.weak import _summary

    votes = np.random.default_rng(0).integers(-1, 3, (200, 4))
    ours = _summary(dict.fromkeys("abcd", lambda row: None), votes, "xyz", None, {}, None)
    theirs = LFAnalysis(votes).lf_summary()
    for name, column in (("coverage", "Coverage"), ("overlap", "Overlaps"), ("conflict", "Conflicts")):
        assert [rule[name] for rule in ours] == pytest.approx(theirs[column].tolist())


def test_few_rules_vote_by_majority(tunesmith: Any, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "r.jsonl", [{"text": t} for t in ("a card", "a loan", "a card and a loan", "none")])
    (tmp_path / "rules.py").write_text("\n".join(RULES.split("\n")[:9]))
    said = tunesmith("data", "label", tmp_path / "rules.py", path, "--json").json
    assert said["model"] == "majority vote" and said["labelled"] == 2 and said["unlabelled"] == [3, 4]
    assert Counter(rule["conflict"] for rule in said["rules"]) == {0.25: 2}
    wrong = {"x = 1": "defines no function", "def a(row): return None": "no rule has an opinion", "1/0": "ZeroDivision"}
    for text, told in wrong.items():
        (tmp_path / "rules.py").write_text(text)
        assert_refused(tunesmith("data", "label", tmp_path / "rules.py", path, "--json"), told)
