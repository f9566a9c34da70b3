"""The recipe: what it holds, how it is changed from the command line, its schema, and the one that init writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import colour_rows, write_jsonl, write_recipe
from tunesmith import recipe as recipes
from tunesmith.errors import RecipeError

SMALLEST = {"name": "small", "model": "smollm2-135m-instruct", "data": {"sources": ["rows.jsonl"]}}


def built(*overrides: str, **keys: Any) -> recipes.Recipe:
    return recipes.build(json.loads(json.dumps(SMALLEST | keys)), overrides)


def test_a_file_and_a_shipped_name_load(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, {k: v for k, v in SMALLEST.items() if k != "name"}, "my-run.yaml")
    loaded, folder = recipes.load(path)
    assert loaded.name == "my-run" and folder == tmp_path
    assert loaded.data.sources[0].path == "rows.jsonl" and loaded.model.name == "smollm2-135m-instruct"
    for name in recipes.shipped():
        loaded, folder = recipes.load(name)
        assert loaded.name == name and (folder / f"{name}.yaml").is_file()
    # what a run keeps is a recipe again, and the same one
    kept = recipes.build(loaded.model_dump(mode="json"))
    assert kept == loaded


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.epochs=0.5", "train.epochs", 0.5),
        ("train.learning_rate=2e-4", "train.learning_rate", 0.0002),
        ("train.learning_rate=1E3", "train.learning_rate", 1000.0),
        ("train.max_steps=null", "train.max_steps", None),
        ("model=other", "model.name", "other"),
        ("model.revision=v1", "model.name", "smollm2-135m-instruct"),
        ("model.revision=v1", "model.revision", "v1"),
        ("train.adapter.rank=8", "train.adapter.rank", 8),
        (
            "train.adapter={kind: lora, rank: 3, targets: [q_proj, v_proj]}",
            "train.adapter.targets",
            ["q_proj", "v_proj"],
        ),
        ("train.adapter.targets=[q_proj]", "train.adapter.targets", ["q_proj"]),
        ("train.method.loss_on=last", "train.method.loss_on", "last"),
        ("data.sources.0=other.csv", "data.sources.0.path", "other.csv"),
        ("data.sources=[a.csv, {path: b.csv, system: Hi}]", "data.sources.1.system", "Hi"),
        ("data.split={test: 12}", "data.split.test", 12),
        ("data.split.test=held.jsonl", "data.split.test", "held.jsonl"),
        ("data.system=a=b: c", None, "data.system: expected text, not a mapping"),
        ('data.system="a=b: c"', "data.system", "a=b: c"),
        ("evaluate.max_new_tokens=3", "evaluate.max_new_tokens", 3),
        (" train.epochs =1", "train.epochs", 1.0),
        ("train.epochs=inf", None, "train.epochs: expected a finite number"),
        ("train.learning_rate=.nan", None, "train.learning_rate: expected a"),
        ("train.clip=.inf", None, "train.clip: expected a finite number"),
    ],
)
def test_set(override: str, key: str | None, value: Any) -> None:
    if key is None:
        with pytest.raises(RecipeError, match=value):
            built(override)
        return
    here: Any = built(override).model_dump(mode="json")
    for part in key.split("."):
        here = here[int(part)] if isinstance(here, list) else here[part]
    assert here == value and type(here) is type(value)


def test_later_sets_build_on_earlier_ones() -> None:
    changed = built("train.adapter=lora", "train.adapter.rank=2", "train.adapter.alpha=4", "train.adapter.rank=3")
    adapter: Any = changed.train.adapter
    assert (adapter.rank, adapter.alpha) == (3, 4)
    source = built("data.sources.0={path: a.csv}", "data.sources.0.system=Hi").data.sources[0]
    assert (source.path, source.system) == ("a.csv", "Hi")


def test_numbers_are_numbers_and_words_are_words(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    text = yaml.safe_dump(SMALLEST) + "train: {learning_rate: 2e-4, warmup: 1e-1, weight_decay: .5}\nseed: 3\n"
    path.write_text(text)
    train = recipes.load(path)[0].train
    assert (train.learning_rate, train.warmup, train.weight_decay) == (2e-4, 0.1, 0.5)
    path.write_text(text.replace("name: small", "name: 2e-4x"))
    assert recipes.load(path)[0].name == "2e-4x"


def test_a_recipe_can_not_be_changed_by_accident() -> None:
    recipe = built()
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.epochs = 9  # type: ignore[misc]


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:
    """Whether a value fits a JSON schema: the keywords that ours uses, and an error for any other."""
    kinds = {
        "object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool,
        "null": type(None),
    }  # fmt: skip
    for keyword, asked in schema.items():
        fits = True
        if keyword == "$ref":
            fits = accepts(root["$defs"][asked.removeprefix("#/$defs/")], value, root)
        elif keyword == "type":
            fits = isinstance(value, kinds[asked]) and (asked == "boolean" or not isinstance(value, bool))
        elif keyword in ("anyOf", "oneOf"):
            fits = any(accepts(branch, value, root) for branch in asked)
        elif keyword == "properties" and isinstance(value, dict):
            fits = all(accepts(s, value[k], root) for k, s in asked.items() if k in value)
        elif keyword == "required" and isinstance(value, dict):
            fits = set(asked) <= set(value)
        elif keyword == "additionalProperties" and isinstance(value, dict):
            others = [v for k, v in value.items() if k not in schema.get("properties", {})]
            fits = not others if asked is False else asked is True or all(accepts(asked, v, root) for v in others)
        elif keyword in ("items", "prefixItems") and isinstance(value, list):
            pairs = [(asked, v) for v in value] if keyword == "items" else zip(asked, value, strict=False)
            fits = all(accepts(s, v, root) for s, v in pairs)
        elif keyword in ("enum", "const"):
            fits = value in (asked if keyword == "enum" else [asked])
        elif keyword in ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"):
            if isinstance(value, int | float):
                less = value < asked if "inimum" in keyword else value > asked
                fits = not less and not (keyword.startswith("exclusive") and value == asked)
        elif keyword in ("minItems", "minLength"):
            fits = not isinstance(value, str | list) or len(value) >= asked
        elif keyword in ("maxItems", "maxLength"):
            fits = not isinstance(value, str | list) or len(value) <= asked
        else:
            known = ("title", "description", "default", "$defs", "$schema", "properties", "required", "items")
            assert keyword in (*known, "prefixItems", "additionalProperties"), f"a keyword to check: {keyword}"
        if not fits:
            return False
    return True


def test_the_schema_takes_what_the_recipe_takes(tunesmith: Any) -> None:
    schema = tunesmith("schema").json
    assert schema["$schema"].startswith("https://json-schema.org/")
    for name in recipes.shipped():
        assert accepts(schema, yaml.safe_load(recipes.find(name).read_text()), schema), name
    written: Any = SMALLEST | {"data": {"sources": ["a.csv", {"path": "b.csv"}], "split": {"test": 9}}}
    assert accepts(schema, written, schema)
    assert accepts(schema, built().model_dump(mode="json"), schema)
    for wrong in ({"trian": {}}, {"seed": "x"}, {"train": {"epochs": -1}}, {"train": {"schedule": "x"}}, {"model": 3}):
        assert not accepts(schema, SMALLEST | wrong, schema), wrong
    told = [key for key, field in schema["properties"].items() if not field.get("description")]
    assert not told, f"keys that the schema does not explain: {told}"


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Good day to you, and all of yours."}]
STARTERS: dict[str, tuple[str, Any, str]] = {
    "chat": ("chat.jsonl", [{"messages": TURNS}], "text"),
    "sharegpt": (
        "share.json",
        [{"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello\nthere"}]}],
        "text",
    ),
    "instruction": ("alpaca.json", [{"instruction": "Add.", "input": "1 2", "output": '{"sum": 3}'}], "json"),
    "prompt": ("my rows.jsonl", colour_rows(), "label"),
    "question": ("qa.csv", "question,answer\nWhat is it?,A thing\n", "text"),
    "columns": (
        "2024.csv",
        "id,Text: said,the #label\n1,How do I pay this bill?,pay\n2,Where is my card?,card\n3,And where is it?,card\n"
        "4,It has not come,card\n",
        "label",
    ),
    "columns, the id last": (
        "_true.tsv",
        "kind\tmessage\tid\npay\tHow do I pay this?\t1\ncard\tWhere is it?\t2\n",
        "text",
    ),
}


@pytest.mark.parametrize("layout", STARTERS)
def test_init_writes_a_recipe_that_checks(tunesmith: Any, tmp_path: Path, tiny_model: Path, layout: str) -> None:
    file, content, kind = STARTERS[layout]
    (tmp_path / "deep/er").mkdir(parents=True)
    if isinstance(content, str):
        (tmp_path / file).write_text(content, encoding="utf-8")
    elif file.endswith(".json"):
        (tmp_path / file).write_text(json.dumps(content), encoding="utf-8")
    else:
        write_jsonl(tmp_path / file, content)
    for out in (None, "deep/er/r.yaml", str(tmp_path / "deep/r.yaml"), "../outside.yaml"):
        said = tunesmith("init", file, *(["--out", out] if out else []), "--json", *(["--force"] if out else []))
        assert said.code == 0, said
        told = said.json
        assert told["layout"] == layout.split(",")[0] and told["answers"] == kind
        if told["columns"]:
            assert told["columns"]["completion"] in ("the #label", "kind")
        flags = [f"--set=model={tiny_model}", "--set=data.split={validation: 0, test: 0}", "--json"]
        checked = tunesmith("check", told["recipe"], *flags)
        assert checked.code == 0, checked
        assert checked.json["counts"]["accepted"] == told["rows"]
    written = Path(tunesmith("init", file, "--force", "--json").json["recipe"])
    loaded, _ = recipes.load(written)
    assert loaded.goal.metric == told["goal"]
    unset = {"data", "train", "evaluate", "package", "goal"}
    assert unset <= set(yaml.safe_load(written.read_text())) and "# " in written.read_text()
    again = tunesmith("init", file, "--json")
    assert again.code == 2 and "is there already" in again.json["error"]["what"]
    assert "--force" in again.json["error"]["fix"]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "holds no rows"),
        (b"\n\n", "holds no rows"),
        (b"\xff\xfe\x00\n", "row 1: is not JSON"),
        (b'{"a": 1}\n', "no layout fits; its columns are: a"),
        (b'{"prompt": 1, "completion": 2}\n', "are: prompt, completion; some are no text (prompt: 1)"),
        (b'{"messages": [3]}\n', "row 1: a message must have 'role' and 'content'"),
        (None, "no such file"),
    ],
)
def test_init_of_a_file_that_nothing_can_be_made_of(
    tunesmith: Any, tmp_path: Path, content: bytes | None, told: str
) -> None:
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    said = tunesmith("init", "rows.jsonl", "--json")
    assert said.code == 2 and told in said.json["error"]["what"], said
    assert not list(tmp_path.glob("*.yaml"))
