"""Write docs/recipe.md from the sections' own fields, so that the page cannot be wrong. `--check` only compares."""

from __future__ import annotations

import sys
import typing
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from tunesmith import plugins
from tunesmith.recipe import Recipe
from tunesmith.section import Section

PAGE = Path(__file__).parents[1] / "docs" / "recipe.md"
HEAD = """# The recipe

Every key, with its default. Made by `python tools/reference.py` from the code; `tunesmith schema` prints the same as a
JSON schema, for editors. All keys but `model` and `data` are optional (a recipe without `name` takes its file's).

```yaml
name: support-triage
seed: 7
goal: {metric: exact_match}
model: smollm2-135m-instruct
data:
  sources:
    - path: tickets.jsonl            # columns: {prompt: text, completion: category}
  split: {validation: 0.1, test: 0.1}
train:
  method: sft
  adapter: {kind: lora, rank: 16, alpha: 32, targets: all-linear}
  epochs: 3
  learning_rate: 2.0e-4
  max_length: 1024
  checkpoint_every: 50
evaluate: {}
package: {}
```
"""


def sections_in(annotation: Any) -> list[type[Section]]:
    """The sections that a field's type holds."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation] if annotation is not Section else []
    return [s for inner in typing.get_args(annotation) for s in sections_in(inner)]


def said(annotation: Any) -> str:
    """A type as a reader wants it."""
    if annotation is type(None):
        return "none"
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (list, tuple):
        return "list of " + " or ".join(dict.fromkeys(said(i) for i in inner if i is not Ellipsis))
    if origin is dict:
        return "mapping"
    if origin is typing.Annotated:
        return said(inner[0])
    if inner:
        return " or ".join(said(i) for i in inner if i is not type(None))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "mapping"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false"}.get(
        getattr(annotation, "__name__", ""), "mapping"
    )


def default(field: Any) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "-"
    return (
        "see below" if isinstance(value, Section) else f"`{str(value).lower() if isinstance(value, bool) else value}`"
    )


def table(title: str, section: type[Section], done: set[type[Section]]) -> str:
    """A section's keys, and then those of the sections in it."""
    done.add(section)
    about = (section.__doc__ or "").strip()
    text = f"\n## {title}\n\n{about}\n\n| key | what | type | default |\n| --- | --- | --- | --- |\n"
    below = ""
    for name, field in section.model_fields.items():
        what = " ".join((field.description or "").split()).replace("|", "\\|")
        text += f"| `{name}` | {what} | {said(field.annotation)} | {default(field)} |\n"
        path = f"{title}.{name}" if title != "recipe" else name
        for inner in sections_in(field.annotation):
            if inner not in done:
                below += table(path, inner, done)
    return text + below


def page() -> str:
    done: set[type[Section]] = set()
    text = HEAD + table("recipe", Recipe, done)
    for key, point in (
        ("data.augment", "augment"),
        ("train.method", "objective"),
        ("train.adapter", "adapter"),
        ("train.optimizer", "optimizer"),
        ("train.keep", "keep"),
        ("train.trackers", "tracker"),
        ("serve.engine", "serving"),
        ("serve.guards", "guard"),
    ):
        for kind in plugins.BUILT_IN[point]:
            text += table(f"{key} ({kind})", plugins.load(point, kind), done)
    for name in plugins.BUILT_IN["clean"]:
        text += table(f"data.clean.{name}", plugins.load("clean", name), done)
    metrics = ", ".join(f"`{name}`" for name in plugins.BUILT_IN["metric"])
    return text + f"\n## Metrics\n\n{metrics}.\n"


def main() -> None:
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
