"""What a prepared set holds: figures for the report, and what to fix first. Rows are read as they are looked at, and
none is kept, so a set may be of any length."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tunesmith.conversation.message import Conversation
from tunesmith.data.clean.contamination import Contamination
from tunesmith.data.clean.duplicates import Duplicates
from tunesmith.data.clean.language import languages
from tunesmith.data.clean.personal import Personal
from tunesmith.data.clean.secrets import Secrets
from tunesmith.data.clean.step import Around, Step
from tunesmith.data.clean.texts import text_of
from tunesmith.data.engines.local import Local
from tunesmith.data.prepare import PARTS
from tunesmith.data.shelf import Rows, Shelf
from tunesmith.errors import MachineError

SHOWN = 20
MEASURED = 5000
LOOKED_THROUGH = 1000
EXAMPLES = 5
SIDES = ("prompt", "answer")
# What is done to the training rows once the others are held out, in this order.
SHAPING = ("augment", "weight", "balance", "mix", "canaries")
# Tokens of one row, a sequence apiece: [(text, its loss weight), ...].
Tokens = Callable[[Conversation], list[list[tuple[str, float]]]]


def survey(folder: Path, manifest: Mapping[str, Any], tokens: Tokens, limit: int, seed: int) -> dict[str, Any]:
    """Everything the report tells of a prepared set, as JSON.

    Args:
        folder: where `prepare` wrote.
        manifest: what it told.
        tokens: how the model sees a row.
        limit: the most tokens that a row may have.
        seed: draws the rows that are shown and, of large sets, those that are measured.
    """
    with TemporaryDirectory() as name, Local().start(Path(name)) as engine:
        shelf = Shelf(Path(name))
        parts = {part: shelf.take(folder / f"{part}.jsonl") for part in PARTS}
        around = Around(seed=seed, held=parts, engine=engine, scratch=shelf.folder)
        return _surveyed(folder, manifest, parts, tokens, limit, around)


def _surveyed(
    folder: Path, manifest: Mapping[str, Any], parts: Mapping[str, Rows], tokens: Tokens, limit: int, around: Around
) -> dict[str, Any]:
    steps = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
    draw, train = random.Random(around.seed), parts["train"]
    some = sampled(train, LOOKED_THROUGH, draw)
    shown: list[dict[str, Any]] = [{"row": row.id, "sequences": tokens(row)} for row in sampled(train, SHOWN, draw)]
    measured = sampled(train, MEASURED, draw)
    said = np.fromiter((len(text_of(row, side)) for row in train for side in SIDES), dtype=np.int64).reshape(-1, 2)
    found: dict[str, Any] = {
        "version": manifest["version"],
        "counts": manifest["counts"],
        "waterfall": waterfall(manifest["counts"]),
        "rejected": _reasons(_entries(folder / "rejected.jsonl"), "reason"),
        "removed": _reasons(_entries(folder / "removed.jsonl"), "step"),
        "flagged": _reasons(_entries(folder / "flagged.jsonl"), "step"),
        "steps": steps,
        "split": manifest.get("split", {}),
        "tokens": manifest["tokens"],
        "lengths": {
            "limit": limit,
            "measured": len(measured),
            "tokens": sorted(sum(map(len, tokens(row))) for row in measured),
            **{f"{side} characters": _spread(said[:, column]) for column, side in enumerate(SIDES)},
        },
        "answers": manifest["answers"]["kind"],
        "labels": {
            part: dict(Counter(row.answer for row in rows).most_common())
            for part, rows in parts.items()
            if manifest["answers"]["kind"] == "label"
        },
        "languages": spoken(some),
        "checks": checks(parts, some, around),
        "shown": shown,
    }
    return found | {"fix first": fix_first(found)}


def waterfall(counts: Mapping[str, Any]) -> list[tuple[str, int]]:
    """How many rows were there after each thing that happened to them."""
    left = counts["read"]
    found = [("read", left)]
    left -= counts["rejected"]
    found.append(("after rejecting", left))
    removed, made = counts["removed"], counts.get("made", {})
    for step in sorted(removed | made, key=lambda step: SHAPING.index(step) if step in SHAPING else -1):
        left += made.get(step, 0) - removed.get(step, 0)
        found.append((f"after {step}", left))
    return [*found, *((part, counts[part]) for part in PARTS)]


def sampled(rows: Rows, count: int, draw: random.Random) -> Rows:
    """So many of the rows at most, drawn."""
    return rows[np.array(draw.sample(range(len(rows)), min(count, len(rows))), dtype=np.int64)]


def _entries(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _reasons(rows: Iterable[Mapping[str, Any]], key: str) -> dict[str, dict[str, Any]]:
    """For each reason: how many rows, and the first few."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        one = found.setdefault(row[key], {"rows": 0, "such as": []})
        one["rows"] += 1
        if len(one["such as"]) < EXAMPLES:
            one["such as"].append({"row": row["row"], "why": row["why"]})
    return dict(sorted(found.items(), key=lambda item: -item[1]["rows"]))


def _spread(values: np.ndarray) -> dict[str, float]:
    ordered = np.sort(values)
    return {
        "smallest": int(ordered[0]),
        "median": float(np.median(ordered)),
        "95%": int(ordered[min(int(0.95 * len(ordered)), len(ordered) - 1)]),
        "largest": int(ordered[-1]),
    }


def spoken(rows: Rows) -> dict[str, int]:
    """How many rows are in each language, the most frequent first; a row in which two are spoken is in both."""
    counted: Counter[str] = Counter()
    for row in rows:
        counted.update({language for _, language, _ in languages(row, ("user", "assistant"))} or {"not judged"})
    return dict(counted.most_common())


def checks(parts: Mapping[str, Rows], some: Rows, around: Around) -> dict[str, dict[str, Any]]:
    """What cleaning steps would find in the training rows as they are now, whether or not the recipe has them; those
    that take long look at `some` of them."""
    train = parts["train"]
    looked: dict[str, tuple[Step, Rows]] = {
        "exact duplicates": (Duplicates(kind="exact"), train),
        "near duplicates": (Duplicates(kind="near"), train),
        "same prompt": (Duplicates(kind="exact", on="prompt"), train),
        "contamination": (Contamination(), train if parts["test"] else train[:0]),
        "personal data": (Personal(names="auto"), some),
        "secrets": (Secrets(action="report"), some),
    }
    return {name: _looked(step, rows, around) for name, (step, rows) in looked.items()}


def _looked(step: Step, rows: Rows, around: Around) -> dict[str, Any]:
    """What a step finds in rows, with the first of them."""
    counted: Counter[str] = Counter()
    such: list[dict[str, str]] = []
    touched = 0
    try:
        for number, verdict in enumerate(step.apply(rows, around) if rows else ()):
            if verdict is None:
                continue
            counted.update(verdict.found)
            if verdict.why:
                touched += 1
                if len(such) < EXAMPLES:
                    such.append({"row": rows[number].id, "why": verdict.why})
    except MachineError as error:
        return {"rows": 0, "looked at": 0, "found": {}, "such as": [], "not done": str(error.what)}
    return {"rows": touched, "looked at": len(rows), "found": dict(counted.most_common()), "such as": such}


Advice = tuple[float, str, str]  # its weight, what is wrong, what to do about it


def fix_first(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """What is worth a person's time, worst first: what is wrong, and what to do about it."""
    advice = [*_of_rows(found), *_of_parts(found)]
    return [{"what": what, "do": do} for _, what, do in sorted(advice, key=lambda a: -a[0])]


def _of_rows(found: Mapping[str, Any]) -> Iterator[Advice]:
    look, counts = found["checks"], found["counts"]
    share = {name: check["rows"] / max(check["looked at"], 1) for name, check in look.items()}
    if n := look["secrets"]["rows"]:
        yield 10, f"{n} rows hold keys or passwords", "clean: {secrets: drop}, and revoke them"
    if n := look["contamination"]["rows"]:
        flatter = f"{n} training rows are asked again by the test: its scores will flatter"
        yield 9, flatter, "clean: {contamination: [test]}"
    if look["personal data"]["rows"]:
        kinds = ", ".join(look["personal data"]["found"])
        yield 8, f"{share['personal data']:.1%} of rows hold personal data ({kinds})", "clean: {personal: mask}"
    if n := counts["rejected"]:
        unusable = f"{n} rows can't be used, most of all: {next(iter(found['rejected']))}"
        yield 7 + n / max(counts["read"], 1), unusable, "mend them: rejected.jsonl"
    conflicts = look["same prompt"]["rows"] - look["exact duplicates"]["rows"]
    if conflicts > 0 and found["answers"] == "label":
        yield 6, f"{conflicts} rows ask what another asks and are answered otherwise", "clean: {conflicts: true}"
    if (near := share["near duplicates"]) > 0.01:
        yield 4 + near, f"{near:.1%} of rows nearly repeat another", "clean: {duplicates: near}"
    judged = {language: n for language, n in found["languages"].items() if language != "not judged"}
    if len(judged) > 1:
        first, known = next(iter(judged)), sum(judged.values())
        others = known - judged[first]
        if others / known > 0.01:
            yield 3, f"{others} of {known} rows looked at are not in '{first}'", f"clean: {{language: [{first}]}}"
    if found["flagged"]:
        yield 2, f"{counts.get('flagged', 0)} rows are listed for a person to look at", "read flagged.jsonl"
    for name, check in look.items():
        if "not done" in check:
            yield 1, f"{name} was not looked for: {check['not done']}", "pip install 'tunesmith[data]'"


def _of_parts(found: Mapping[str, Any]) -> Iterator[Advice]:
    for part, short in found["split"].get("short", {}).items():
        if 2 * short["rows"] < short["asked for"]:
            few = (
                f"{part} has {short['rows']} rows where {short['asked for']} were asked for: rows that go together are "
            )
            yield 9, few + "too many", "give another data.split.by, or near: null"
    labels = found["labels"].get("train", {})
    if labels and max(labels.values()) > 20 * min(labels.values()):
        rare = min(labels, key=lambda k: labels[k])
        seldom = f"label '{rare}' has {labels[rare]} rows, the most frequent {max(labels.values())}"
        yield 3, seldom, "collect more of the rare ones"
    if missing := set(found["labels"].get("test", {})) - set(labels):
        untaught = f"{len(missing)} labels are tested and never taught, such as '{min(missing)}'"
        yield 5, untaught, "add training rows of them"
    if (rows := found["counts"]["train"]) < 50:
        yield 2, f"{rows} training rows are few", "a few hundred are a good start"
