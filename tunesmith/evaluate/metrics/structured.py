"""Answers with a form: JSON and its schema, tool calls, spans, numbers."""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np

from tunesmith.errors import DataError, MachineError, first_line
from tunesmith.evaluate.metrics.base import Answers, Floats, Metric, by_row, counted, f1, mean, parse, rows


def fields(value: Any, path: str = "") -> set[tuple[str, str]]:
    """The leaves of a JSON value as (path, value as JSON)."""
    if isinstance(value, dict) and value:
        return {leaf for key, inner in value.items() for leaf in fields(inner, f"{path}/{key}")}
    if isinstance(value, list) and value:
        return {leaf for i, inner in enumerate(value) for leaf in fields(inner, f"{path}/{i}")}
    if isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # hundreds of digits, as models that lost their way write them
            value = float(value)
    return {(path, json.dumps(value))}


def _by_field(answers: Answers) -> Floats:
    stats = []
    for given, reference in zip(answers.given, answers.references, strict=True):
        wanted, got = fields(parse(reference)), fields(parse(given)) if parse(given) is not None else set()
        stats.append([len(wanted & got), len(got - wanted), len(wanted - got)])
    return np.asarray(stats, dtype=np.float64)


def by_field(answers: Answers) -> dict[str, Any]:
    """Of each field of the references: how often the answers have it right."""
    right: Counter[str] = Counter()
    there: Counter[str] = Counter()
    for given, reference in zip(answers.given, answers.references, strict=True):
        wanted, got = fields(parse(reference)), fields(parse(given)) if parse(given) is not None else set()
        there.update(path for path, _ in wanted)
        right.update(path for path, _ in wanted & got)
    return {"fields": {path.lstrip("/"): {"right": right[path] / n, "n": n} for path, n in sorted(there.items())}}


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    try:
        import jsonschema
    except ImportError as error:
        raise MachineError(
            "schema_valid needs the package jsonschema",
            where="evaluate.metrics",
            fix="Install it: pip install 'tunesmith[metrics]'",
        ) from error
    try:
        value = json.loads(schema)
        kind = jsonschema.validators.validator_for(value)
        kind.check_schema(value)
    except (ValueError, RecursionError, jsonschema.SchemaError) as error:
        raise DataError(
            f"is not a JSON schema ({first_line(error)})", where="schema", fix="Mend the schema."
        ) from error
    return kind(value)


def _valid(value: Any, schema: str) -> bool:
    from referencing.exceptions import Unresolvable

    try:
        return bool(_validator(schema).is_valid(value))
    except Unresolvable as error:
        what = f"a JSON schema refers to what it does not hold ({first_line(error)})"
        raise DataError(what, where="schema", fix="Put what it refers to into its $defs.") from error
    except (OverflowError, RecursionError):  # of an answer: numbers or depths that nothing holds
        return False


def _schema_valid(answers: Answers) -> Floats:
    """Whether each answer is JSON that its row's schema (a JSON schema, as an object or as text) allows."""
    found = []
    for given, schema in zip(answers.given, answers.told("schema", "schema_valid"), strict=True):
        try:
            value = json.loads(given)
        except (ValueError, RecursionError):
            found.append(0.0)
            continue
        found.append(float(_valid(value, schema if isinstance(schema, str) else json.dumps(schema))))
    return rows(found)


def calls(text: str) -> list[tuple[str, str]] | None:
    """The tool calls in an answer as (name, arguments as canonical JSON): a JSON call or list of calls, alone or in
    <tool_call> tags; None if it holds none."""
    blocks = re.findall(r"<tool_call>\s*(.*?)\s*</tool_call>", text, re.DOTALL) or [text]
    found: list[tuple[str, str]] = []
    for block in blocks:
        try:
            value = json.loads(block)
        except (ValueError, RecursionError):
            return None
        for call in value if isinstance(value, list) else [value]:
            call = call.get("function", call) if isinstance(call, dict) else call
            if not isinstance(call, dict) or not isinstance(call.get("name"), str):
                return None
            arguments = call.get("arguments", call.get("parameters", {}))
            if isinstance(arguments, str):
                try:
                    arguments = json.loads(arguments)
                except ValueError:
                    return None
            found.append((call["name"], json.dumps(arguments, sort_keys=True)))
    return found


def _same_calls(given: str, reference: str) -> float:
    wanted = calls(reference)
    if wanted is None:  # the right answer calls nothing
        return float(calls(given) is None)
    got = calls(given)
    return float(got is not None and sorted(got) == sorted(wanted))


def _same_names(given: str, reference: str) -> float:
    wanted, got = calls(reference), calls(given)
    if wanted is None or got is None:
        return float(wanted is got)
    return float(sorted(name for name, _ in got) == sorted(name for name, _ in wanted))


def spans(text: str) -> Counter[tuple[str, str]]:
    """Named spans: JSON objects {"text": ..., "label": ...} in a list, a {label: [texts]} object, or lines
    `label: text`."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    found: Counter[tuple[str, str]] = Counter()
    if isinstance(value, dict):
        value = [(label, t) for label, texts in value.items() for t in (texts if isinstance(texts, list) else [texts])]
    for item in value if isinstance(value, list) else []:
        if isinstance(item, dict):
            item = (item.get("label", item.get("type", "")), item.get("text", item.get("span", "")))
        if isinstance(item, list | tuple) and len(item) == 2:
            found[(str(item[0]).strip(), str(item[1]).strip())] += 1
    return found


def _by_span(answers: Answers) -> Floats:
    stats = []
    for given, reference in zip(answers.given, answers.references, strict=True):
        got, wanted = spans(given), spans(reference)
        hits = (got & wanted).total()
        stats.append([hits, got.total() - hits, wanted.total() - hits])
    return np.asarray(stats, dtype=np.float64)


NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def last_number(text: str) -> float | None:
    """GSM8K's answer: the first number behind the last ####, else the last number there is."""
    _, marked, behind = text.rpartition("####")
    found = (NUMBER.findall(behind)[:1] if marked else []) or NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


def _same_number(given: str, reference: str) -> float:
    got, wanted = last_number(given), last_number(reference)
    return float(got is not None and wanted is not None and abs(got - wanted) <= 1e-6 * max(1.0, abs(wanted)))


json_valid = by_row("json_valid", lambda given, _: parse(given) is not None, binary=True)
json_field_f1 = Metric("json_field_f1", _by_field, lambda s: f1(*np.moveaxis(s, -1, 0)), details=by_field)
schema_valid = Metric("schema_valid", _schema_valid, mean, binary=True)
tool_call = by_row("tool_call", _same_calls, binary=True)
tool_name = by_row("tool_name", _same_names, binary=True)
span_f1 = Metric("span_f1", _by_span, lambda s: counted(s, "f1"))
numeric = by_row("numeric", _same_number, binary=True)
