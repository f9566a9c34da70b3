"""The recipe: the whole journey in one file, composed of the stages' sections."""

from __future__ import annotations

import contextlib
import json
import re
import typing
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BeforeValidator, Field, ValidationError, field_validator, model_validator

from tunesmith import plugins
from tunesmith.data.section import DataSection
from tunesmith.errors import RecipeError, RunError, nearest
from tunesmith.evaluate.section import EvaluateSection, Gate, GoalSection, answerable
from tunesmith.models.section import ModelSection
from tunesmith.package.section import PackageSection
from tunesmith.runs import NAME, Run
from tunesmith.section import Section
from tunesmith.serve.section import ServeSection
from tunesmith.train.section import TrainSection
from tunesmith.train.space import TuneSection

# Keys that pick a plugin by `kind`, and its point: their own settings are known only to the plugin.
POINTS = {"method": "objective", "adapter": "adapter", "optimizer": "optimizer", "parallel": "parallel"}
ENGINES = {"data": "data_engine", "serve": "serving"}  # the same, of `engine`, by the section that it stands in
LISTS = {"trackers": "tracker", "keep": "keep", "guards": "guard"}  # keys that hold a list of such
# Keys that hold plugins by name, and their point.
TABLES = {"clean": "clean"}


def _model(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class Recipe(Section):
    """One recipe: a model, data, and how to get from one to a better other."""

    name: str
    """The run's name: its folder under runs/."""
    seed: int = Field(7, ge=0, lt=2**32)
    """Behind every random choice."""
    goal: GoalSection = GoalSection()
    """What decides the verdict."""
    model: Annotated[ModelSection, BeforeValidator(_model, json_schema_input_type=str | ModelSection)]
    """The base model."""
    data: DataSection
    """The rows."""
    train: TrainSection = TrainSection()
    """How to train."""
    evaluate: EvaluateSection = EvaluateSection()
    """How to prove it."""
    gate: Gate = None
    """What must be proved before it is handed on; nothing is held back, if not given."""
    package: PackageSection = PackageSection()
    """What to hand on."""
    serve: ServeSection = ServeSection()
    """How `tunesmith serve` answers by it; a run does not look at it."""
    tune: TuneSection = TuneSection()
    """What `tunesmith tune` may change; a run does not look at it."""

    @model_validator(mode="after")
    def _stopping_needs_validation(self) -> Recipe:
        if self.train.early_stopping and self.data.split.validation == 0:
            raise ValueError("train.early_stopping needs validation rows: data.split.validation is 0")
        if self.train.best_by != "loss" and self.data.split.validation == 0:
            raise ValueError("train.best_by needs validation rows: data.split.validation is 0")
        return self

    @model_validator(mode="after")
    def _gate_is_about_scores(self) -> Recipe:
        if self.gate:
            answerable(self.gate, self.evaluate, self.goal)
        return self

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not NAME.fullmatch(value):
            raise ValueError("a run's name is letters, digits, dots, dashes and underscores (at most 100)")
        return value


def shipped() -> list[str]:
    """The names of the recipes that come with Tunesmith."""
    return sorted(p.name.removesuffix(".yaml") for p in _recipes().iterdir() if p.name.endswith(".yaml"))


def find(name: str) -> Path:
    """The file of a recipe: a path, or the name of a shipped one."""
    path = Path(name)
    if path.is_file():
        return path
    if path.is_dir():
        raise RecipeError("is a folder, not a recipe", where=name, fix="Give a recipe file (.yaml).")
    if name in shipped():
        return Path(str(_recipes() / f"{name}.yaml"))
    raise RecipeError(
        f"no recipe '{name}'{nearest(name, shipped())}",
        fix=f"Give a file that exists, or a shipped recipe: {', '.join(shipped())}. A new one: tunesmith init DATA",
    )


def load(name: str | Path, overrides: Sequence[str] = ()) -> tuple[Recipe, Path]:
    """A validated recipe and the folder that its paths are relative to.

    Args:
        name: a file, or the name of a shipped recipe.
        overrides: `key.path=value`, values as YAML.

    Raises:
        RecipeError: names the file and the key, and what was expected there.
    """
    path = find(str(name))
    raw = read(path)
    if not isinstance(raw, dict):
        raise RecipeError("is not a recipe: no keys", where=str(path), fix="A new one: tunesmith init DATA")
    raw.setdefault("name", path.stem)
    return build(raw, overrides, str(path)), path.resolve().parent


def read(path: Path) -> Any:
    """What a YAML file holds.

    Raises:
        RecipeError: names the file and the line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise RecipeError(f"can't be read ({error.strerror})", where=str(path), fix="Check the path.") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"is not UTF-8 ({error})", where=str(path), fix="Save it as UTF-8.") from error
    except RecursionError as error:
        raise RecipeError("is not a recipe: nested too deep", where=str(path), fix="Check the brackets.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or error
        raise RecipeError(f"is not YAML ({problem})", where=where, fix="Check the indentation there.") from error


def kept(run: Run) -> dict[str, Any]:
    """The keys that a run was made with.

    Raises:
        RecipeError, RunError: its recipe.yaml is damaged; names it.
    """
    keys = read(run.recipe)
    if not isinstance(keys, dict):
        raise RunError("is damaged: it holds no recipe", where=str(run.recipe), fix=f"Remove the run: rm -r {run.path}")
    return keys


def build(raw: dict[str, Any], overrides: Sequence[str] = (), where: str = "recipe") -> Recipe:
    """A recipe from its keys and overrides.

    Raises:
        RecipeError: as `load`.
    """
    for override in overrides:
        _apply(raw, override)
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        blamed = _override_of(error, overrides) or where
        raise RecipeError(told(error, raw), where=blamed, fix="All keys: tunesmith schema, docs/recipe.md.") from None


class _Loader(yaml.SafeLoader):
    """YAML without two surprises: a key given twice, and 2e-4 read as text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value]
        for i, key in enumerate(keys):
            if key in keys[:i]:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' is there twice", node.value[i][0].start_mark
                )
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def value_of(text: str, where: str) -> Any:
    """A value as the command line gives it.

    Raises:
        RecipeError: it is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError) as error:
        fix = "Values are written as in a recipe: 3, true, [a, b], text."
        raise RecipeError(f"'{text[:200]}' is not YAML", where=where, fix=fix) from error


def _apply(raw: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise RecipeError(f"'{override}' is not key=value", where="--set", fix="Write for example --set train.epochs=1")
    value = value_of(text, f"--set {path}")
    here: Any = raw
    for key in keys[:-1]:
        inner = _get(here, key, override)
        if inner is None:
            sections: dict[str, type[Section]] = {"data": DataSection, "serve": ServeSection}
            section = sections.get(keys[0], TrainSection)
            picks = _point(key, keys[0]) and key in section.model_fields
            inner = here[key] = {"kind": section.model_fields[key].default} if picks else {}
        elif isinstance(inner, str) and (key == "model" or _point(key, keys[0])):
            inner = here[key] = {"name" if key == "model" else "kind": inner}
        here = inner
    last: Any = keys[-1]
    if isinstance(here, list):
        _get(here, last, override)
        last = int(last)
    elif not isinstance(here, dict):
        raise RecipeError(
            f"'{'.'.join(keys[:-1])}' holds no keys, but a value",
            where=f"--set {override}",
            fix="Set the value itself, or check the key: tunesmith schema.",
        )
    here[last] = value


def _point(key: int | str, top: int | str) -> str | None:
    """The extension point of a key that picks one plugin by `kind`; `top` is the section that it stands in."""
    return ENGINES.get(str(top)) if key == "engine" else POINTS.get(str(key))


def _get(here: Any, key: str, override: str) -> Any:
    if isinstance(here, dict):
        return here.get(key)
    if isinstance(here, list) and key.isdigit() and int(key) < len(here):
        return here[int(key)]
    raise RecipeError(f"there is no '{key}' to set", where=f"--set {override}", fix="Lists are counted from 0.")


def _override_of(error: ValidationError, overrides: Sequence[str]) -> str | None:
    """The override that made a recipe invalid, where one did."""
    wrong = [".".join(str(part) for part in found["loc"]) for found in error.errors()]
    for override in reversed(overrides):
        key = override.partition("=")[0].strip()
        inside = all(f"{w}.".startswith(f"{key}.") for w in wrong)
        if inside or (key.endswith(".kind") and all(w.startswith(key.removesuffix("kind")) for w in wrong)):
            return f"--set {override}"
    return None


EXPECTED = {
    **dict.fromkeys(("float_type", "float_parsing"), "a number"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("model_type", "model_attributes_type", "dict_type", "mapping_type"), "a mapping of keys"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    "string_type": "text",
    "string_too_short": "must not be empty",
}


def told(error: ValidationError, raw: dict[str, Any], of: type[Section] | None = None) -> str:
    """Each of pydantic's findings as a sentence, the first five.

    Args:
        of: what `raw` was to be; a recipe if not given.
    """
    lines = []
    for found in error.errors()[:5]:
        key = ".".join(str(part) for part in found["loc"]) or "recipe"
        kind = found["type"]
        if kind == "extra_forbidden":
            last = str(found["loc"][-1])
            lines.append(f"{key}: unknown key{nearest(last, _keys(found['loc'][:-1], raw, of or Recipe))}")
        elif kind == "missing":
            lines.append(f"{key}: is missing")
        else:
            wanted = found["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
            wanted = EXPECTED.get(kind, wanted)
            given = found["input"]
            shown = ", not " + ("a mapping" if isinstance(given, dict) else json.dumps(given, default=str)[:80])
            expected = "expected " if found["msg"].startswith("Input should be ") else ""
            lines.append(f"{key}: {expected}{wanted}{shown if expected else ''}")
    return "\n  ".join(lines) if len(lines) == 1 else "\n  " + "\n  ".join(lines)


def _keys(loc: Sequence[int | str], raw: Any, of: type[Section]) -> list[str]:
    """The keys that are known at a place in `raw`, which was to be an `of`."""
    here: Any = of
    point: str | None = None
    for before, part in zip((None, *loc), loc, strict=False):
        with contextlib.suppress(KeyError, IndexError, TypeError):  # a loc also names branches of a union
            raw = raw[part]
        if isinstance(part, int) and point and isinstance(raw, dict):
            here = plugins.load(point, raw["kind"])
        if isinstance(part, int) or not (isinstance(here, type) and issubclass(here, Section)):
            continue
        if here is Section and before in TABLES:
            here = plugins.load(TABLES[str(before)], part)
            continue
        point = LISTS.get(part)
        field = here.model_fields.get(str(part))
        here = _section_in(field.annotation) if field else None
        if here is Section and (one := _point(part, loc[0])) and isinstance(raw, dict):
            here = plugins.load(one, raw["kind"])
    return list(here.model_fields) if isinstance(here, type) and issubclass(here, Section) else []


def _section_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    for inner in typing.get_args(annotation):
        found = _section_in(inner)
        if found is not None:
            return found
    return None


def _recipes() -> Any:
    return files("tunesmith") / "recipes"


def schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors."""
    schema = Recipe.model_json_schema()
    schema["required"].remove("name")  # a file's own name stands in for it
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema
