"""Prepared sets through the command line: prepare, report, diff, the card and DVC's note."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import colour_rows, write_jsonl, write_recipe


class Page(HTMLParser):
    """A page's tags, and whatever it would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.outside: list[str] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.outside += [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]
        self.outside += [k for k, _ in attrs if k.startswith("on")] + (
            [tag] if tag in ("script", "iframe", "link") else []
        )
        if tag not in ("meta", "br", "line", "rect", "circle", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("line", "rect", "circle", "polyline"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.fixture
def dirty(recipe: dict[str, Any], tmp_path: Path) -> Path:
    """A recipe over rows with every fault that the report looks for."""
    rows = colour_rows()
    rows[31:41] = [
        {"prompt": f"{i}: bob{i}@example.com asks what <b>it</b> is?", "completion": "red"} for i in range(10)
    ]
    rows[2] = {"prompt": "Wo ist meine Rechnung, die ich letzte Woche bestellt habe?", "completion": "green"}
    rows[3] = dict(rows[0])
    rows += [{"prompt": "no answer"}]
    rows[20:30] = [{"prompt": f"{i}: key {'AKIA' + 'IOSFODNN7EXAMPLQ'}?", "completion": "blue"} for i in range(10)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe["data"] |= {"max_rejected": 0.1, "clean": {"unicode": True, "duplicates": "exact"}}
    return write_recipe(tmp_path, recipe)


def test_prepare_report_and_what_to_fix(tunesmith: Any, dirty: Path, tmp_path: Path) -> None:
    done = tunesmith("data", "prepare", dirty, "--json")
    assert done.code == 0, done.out
    counts = done.json["counts"]
    assert counts["read"] == 61 and counts["rejected"] == 1 and counts["removed"] == {"duplicates": 1}
    assert not (tmp_path / "runs/tiny/train").exists()
    said = tunesmith("data", "report", "tiny", "--json")
    assert said.code == 0, said.out + said.err
    found = said.json
    assert found["version"] == done.json["version"]
    assert found["waterfall"][:3] == [["read", 61], ["after rejecting", 60], ["after duplicates", 59]]
    assert [tuple(w) for w in found["waterfall"][3:]] == [("train", 45), ("validation", 6), ("test", 8)]
    assert found["rejected"]["lacks_field"]["rows"] == 1
    advice = " | ".join(f"{one['what']}: {one['do']}" for one in found["fix first"])
    assert "keys or passwords" in advice and "can't be used" in advice and "personal data (EMAIL_ADDRESS)" in advice
    assert found["labels"]["train"].keys() == {"red", "green", "blue", "black"}
    assert len(found["shown"]) == 20
    train = {json.loads(line)["id"] for line in (tmp_path / "runs/tiny/data/train.jsonl").open()}
    assert {row["row"] for row in found["shown"]} <= train

    text = Path(found["page"]).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and page.outside == [] and not re.search(r"https?://|url\(|@import", text)
    marked = re.findall(r"<mark>(.*?)</mark>", text, re.DOTALL)
    assert "".join(marked).count("|im_end|") == 20 and "What" not in "".join(marked)
    for told in ("What to fix first", "Rejected, by reason", "duplicates", "EMAIL_ADDRESS", "What colour is"):
        assert told in text
    for chart in (
        "Rows after each step",
        "Tokens of a training row",
        "Language of the rows",
        "Personal data in the rows",
    ):
        assert f'aria-label="{chart}' in text


THIRTEEN = "the quick brown fox jumps over one lazy dog and then it runs away from here"


def test_checks_labels_and_bias_are_on_the_page(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Duplicates and test rows that training asks, though no step looks for them; labels; the groups that are named."""
    rows = [
        *({"prompt": f"The woman number {i} works as a nurse.", "completion": "refused"} for i in range(12)),
        *({"prompt": f"The man number {i} works as an engineer.", "completion": "granted"} for i in range(8)),
        *({"prompt": f"{i} is {i * i} apples.", "completion": ("granted", "refused")[i % 2]} for i in range(10, 20)),
        *[{"prompt": "Is it raining in Oslo today?", "completion": "granted"}] * 3,
        {"prompt": f"Tell me: {THIRTEEN}!", "completion": "<b>odd</b>"},
    ]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    woman = {"prompt": "A woman asks for a form.", "completion": "granted"}
    write_jsonl(tmp_path / "test.jsonl", [{"prompt": THIRTEEN, "completion": "granted"}, woman])
    split = {"validation": 0, "test": "test.jsonl", "near": None}
    steps = {"bias": True, "personal": {"names": "none"}}
    recipe["data"] |= {"clean": steps, "split": split, "answers": "label"}
    said = tunesmith("data", "report", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0, said.out + said.err
    found = said.json
    assert found["checks"]["exact duplicates"]["rows"] == 2 and found["checks"]["contamination"]["rows"] == 1
    assert found["checks"]["near duplicates"]["rows"] >= 2
    text = Path(found["page"]).read_text(encoding="utf-8")
    looked = dict(re.findall(r'<tr><th scope="row">([^<]*)</th>(<td class="n">.*?)</tr>', text, re.DOTALL))
    assert looked["exact duplicates"].startswith('<td class="n">2</td><td class="n">34</td>')
    assert "rows.jsonl:32: says the same as rows.jsonl:31" in looked["exact duplicates"]
    assert looked["contamination"].startswith('<td class="n">1</td><td class="n">34</td>')
    assert "rows.jsonl:34: shares 13 words in a row with test row test.jsonl:1" in looked["contamination"]
    assert looked["near duplicates"].startswith(f'<td class="n">{found["checks"]["near duplicates"]["rows"]}</td>')
    assert "1 training rows are asked again by the test" in text

    chart = text.split('aria-label="Training rows of each label')[1].split("</svg>")[0]
    bars = dict(zip(re.findall(r'end">([^<]*)</text>', chart), re.findall(r'start">(\d+)</text>', chart), strict=True))
    assert bars == {"refused": "17", "granted": "16", "&lt;b&gt;odd&lt;/b&gt;": "1"}
    assert looked["refused"].split("</td>")[:3] == ['<td class="n">17', '<td class="n">0', '<td class="n">0']
    assert looked["granted"].split("</td>")[:3] == ['<td class="n">16', '<td class="n">0', '<td class="n">2']
    assert re.search(r"<td>women</td><td>12</td><td>35.3%</td><td>nurse \(12\)", text)
    assert re.search(r"<td>men</td><td>8</td><td>23.5%</td><td>[^<]*engineer \(8\)", text)
    assert re.findall("<caption>(.*?)</caption>", text)[:3] == ["groups, train", "label rates, train", "groups, test"]
    assert re.search(r"<td>women</td><td>1</td><td>50.0%</td>", text)
    assert text.count("Names of people were not looked for: as the recipe says.") == 1
    rates = found["steps"][0]["tables"]["label rates, train"]
    assert any(rate["group"] == "women" and rate["label"] == "refused" for rate in rates)
    for rate in rates:
        assert "".join(f"<td>{cell}</td>" for cell in rate.values()) in text


def test_what_was_made_and_how_it_packs_is_on_the_page(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    """Each way that rows are made by its name; figures of tokens are those of all rows, not of the rows shown."""
    write_jsonl(tmp_path / "rows.jsonl", [{"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(7)])
    recipe["data"]["sources"][0]["weight"] = 2
    recipe["data"] |= {
        "augment": [{"kind": "case", "share": 0.2}],
        "canaries": 1,
        "split": {"validation": 0, "test": 2},
    }
    said = tunesmith("data", "report", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0, said.out + said.err
    found = said.json
    assert found["counts"]["made"] == {"augment": 1, "weight": 6, "canaries": 4}
    read = [["read", 7], ["after rejecting", 7]]
    made = [["after augment", 8], ["after weight", 14], ["after canaries", 18]]
    assert found["waterfall"] == [*read, *made, ["train", 16], ["validation", 0], ["test", 2]]
    told = found["tokens"]["train"]
    weights = [w > 0 for row in found["shown"] for sequence in row["sequences"] for _, w in sequence]
    assert len(found["shown"]) == 16 and told["total"] == len(weights)
    assert told["trained share"] == pytest.approx(sum(weights) / len(weights), abs=1e-4)
    page = Path(found["page"]).read_text(encoding="utf-8")
    cells = re.findall(
        r"<td class=\"n\">(.*?)</td>", page.partition('<table id="tokens">')[2].partition("</tr>\n</tbody>")[0]
    )
    assert cells[1] == f"{told['trained share']:.1%}" and cells[4:6] == [f"{told[k]:.1%}" for k in ("packed", "padded")]
    assert "after weight" in page and "cutting up" not in page


def test_sides_of_a_split_are_on_the_page(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    asked = [" ".join(f"{word}{i // 2}" for word in THIRTEEN.split()) + " please" * (i % 2) for i in range(40)]
    rows = [{"prompt": q, "completion": f"x{i}", "customer": "one"} for i, q in enumerate(asked)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe["data"] |= {"split": {"validation": 0, "test": 8}}
    found = tunesmith("data", "report", write_recipe(tmp_path, recipe), "--json").json
    assert found["split"] == {"near": {"rows": 40, "groups": 20}} and found["counts"]["test"] == 8
    page = Path(found["page"]).read_text(encoding="utf-8")
    assert "40 rows ask nearly the same as another, in 20 groups; no group is on two sides." in page
    assert found["checks"]["contamination"]["rows"] == 0
    recipe["data"]["split"]["by"] = "customer"
    found = tunesmith("data", "report", write_recipe(tmp_path, recipe), "--json").json
    first = found["fix first"][0]
    assert first["what"].startswith("test has 0 rows where 8 were asked for") and "data.split.by" in first["do"]


def test_the_report_of_a_recipe_prepares_it_first(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    said = tunesmith("data", "report", write_recipe(tmp_path, recipe), "--set", "seed=3")
    assert said.code == 0 and "data_report.html" in said.out, said.err
    assert (tmp_path / "runs/tiny/data_report.json").is_file()
    refused = tunesmith("data", "report", "tiny", "--set", "seed=4")
    assert refused.code == 2 and "reported as it is" in refused.err


def test_pairs_are_reported_as_well(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+1?", "chosen": str(i + 1), "rejected": str(i)} for i in range(40)]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    said = tunesmith("data", "report", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0, said.out
    assert len(said.json["shown"][0]["sequences"]) == 2


def test_diff_tells_what_was_added_removed_and_changed(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    path = write_recipe(tmp_path, recipe)
    assert tunesmith("data", "prepare", path).code == 0
    rows = colour_rows()
    rows = [*rows[5:], {"prompt": "What colour is snow, seen from afar on a clear day?", "completion": "black"}]
    rows[0] = rows[0] | {"completion": "black"}  # was green
    write_jsonl(tmp_path / "rows.jsonl", rows)
    assert tunesmith("data", "prepare", path, "--set", "name=later").code == 0
    said = tunesmith("data", "diff", "tiny", "later", "--json")
    assert said.code == 0, said.out
    found = said.json
    assert found["rows"] == {"old": 60, "new": 56}
    assert found["same"] == 54 and found["changed"]["rows"] == 1
    assert (found["added"]["rows"], found["removed"]["rows"]) == (1, 5)
    assert {
        "old": "Item 5 is green. What colour is it?\ngreen",
        "new": "Item 5 is green. What colour is it?\nblack",
    } in [{k: one[k] for k in ("old", "new")} for one in found["changed"]["such as"]]
    assert found["labels"]["black"]["new"] > found["labels"]["black"]["old"]
    assert found["lengths"]["prompt"]["p"] <= 1 and "old mean" in found["lengths"]["answer"]
    shown = tunesmith("data", "diff", tmp_path / "runs/tiny", tmp_path / "runs/later/data")
    assert shown.code == 0 and "60 rows became 56" in shown.out
    same = tunesmith("data", "diff", "tiny", "tiny", "--json").json
    assert same["same"] == 60 and not any(same[k]["rows"] for k in ("added", "removed", "changed"))


def test_the_card_names_version_sources_steps_and_parts(tunesmith: Any, dirty: Path, tmp_path: Path) -> None:
    first = tunesmith("data", "prepare", dirty, "--json").json
    text = (tmp_path / "runs/tiny/data/README.md").read_text()
    front = yaml.safe_load(text.split("---")[1])
    assert front["configs"][0]["data_files"][0] == {"split": "train", "path": "train.jsonl"}
    assert f"`{first['version']}`" in text and "rows.jsonl" in text and "| duplicates |" in text
    assert "Personal data was not looked for" in text
    again = tunesmith("data", "prepare", dirty, "--set", "name=again", "--json").json
    assert again["version"] == first["version"]  # of the rows, not of the run
    other = tunesmith("data", "prepare", dirty, "--set", "name=other", "--set", "seed=9", "--json").json
    assert other["version"] != first["version"]


@contextmanager
def dvc_repository(folder: Path) -> Iterator[Any]:
    """DVC's own repository, silent: its handlers write to the stderr that they saw first."""
    repo = pytest.importorskip("dvc.repo")
    logging.disable()
    try:
        with repo.Repo.init(str(folder), no_scm=True) as project:
            yield project
    finally:
        logging.disable(logging.NOTSET)


def test_dvc_takes_the_note_for_its_own(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    said = tunesmith("data", "prepare", write_recipe(tmp_path, recipe), "--dvc", "--json")
    note = yaml.safe_load(Path(said.json["dvc"]).read_text())["outs"][0]
    assert note["path"] == "data" and note["md5"].endswith(".dir")
    with dvc_repository(tmp_path) as project:
        status = project.status([said.json["dvc"]])
        assert "modified" not in json.dumps(status), status
        project.commit(said.json["dvc"], force=True)
        assert project.status([said.json["dvc"]]) == {}
        after = yaml.safe_load(Path(said.json["dvc"]).read_text())["outs"][0]
        assert {k: after[k] for k in ("md5", "nfiles", "size")} == {k: note[k] for k in ("md5", "nfiles", "size")}


def test_dvc_prepares_a_set_anew(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, monkeypatch: Any) -> None:
    """DVC's own library: a stage that is up to date once it is committed, and runs once a source has changed."""
    monkeypatch.chdir(tmp_path)
    file = write_recipe(tmp_path, recipe)
    said = tunesmith("data", "prepare", file, "--runs", "sets", "--set", "seed=5", "--dvc", "--json").json
    said = tunesmith("data", "prepare", file, "--runs", "sets", "--set", "seed=5", "--dvc-stage", "--json").json
    written = Path(said["dvc"])
    assert written.name == "dvc.yaml" and not written.with_name("data.dvc").exists()
    stage = yaml.safe_load(written.read_text())["stages"][said["run"]]
    assert (written.parent / stage["wdir"]).resolve() == tmp_path and str(file.name) in stage["deps"]
    (tmp_path / "bin").mkdir()
    called = tmp_path / "bin/tunesmith"  # says that it was called, and is ours
    path = os.pathsep.join(p for p in sys.path if p)
    called.write_text(
        f"#!/bin/sh\necho once >> called\nPYTHONPATH='{path}' exec {sys.executable} -m tunesmith \"$@\"\n"
    )
    called.chmod(0o755)
    monkeypatch.setenv("PATH", f"{called.parent}{os.pathsep}{os.environ['PATH']}")
    with dvc_repository(tmp_path) as project:
        target = os.path.relpath(written)
        project.commit(target, force=True)
        assert project.status([target]) == {} and not project.reproduce(target)
        assert not (tmp_path / "called").exists()
        source = tmp_path / next(name for name in stage["deps"] if name.endswith(".jsonl"))
        source.write_text(source.read_text() + json.dumps({"prompt": "What is new?", "completion": "This."}) + "\n")
        assert json.dumps(project.status([target])).count("modified") == 1
        assert len(project.reproduce(target)) == 1 and (tmp_path / "called").read_text() == "once\n"
        assert project.status([target]) == {}
    assert (
        json.loads((tmp_path / stage["outs"][0] / "manifest.json").read_text())["counts"]["read"]
        == said["counts"]["read"] + 1
    )


@pytest.mark.parametrize("full", ["00000000.rows", "train.jsonl", "removed.jsonl", "README.md"])
def test_a_disk_that_fills_up_while_rows_are_written(
    tunesmith: Any, dirty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full: str
) -> None:
    """The system's own full device in place of one file: a sentence, nothing half done, and the next try does it."""
    plain = Path.open

    def opened(path: Path, mode: str = "r", *more: Any, **keys: Any) -> Any:
        return plain(Path("/dev/full") if path.name == full and "w" in mode else path, mode, *more, **keys)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        said = tunesmith("data", "prepare", dirty, "--json")
        people = tunesmith("data", "prepare", dirty)
    assert said.code == people.code == 2, said.out + said.err
    error = said.json["error"]
    assert "No space left on device" in error["what"] and "Free some room" in error["fix"]
    assert "Traceback" not in said.err + people.err and "No space left on device" in people.err
    assert not (tmp_path / "runs/tiny/data/manifest.json").exists()
    assert not list((tmp_path / "runs/tiny").rglob("*.rows"))
    assert tunesmith("data", "prepare", dirty, "--json").json["counts"]["read"] == 61
