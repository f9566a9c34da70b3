"""Is a file's every line a row to train on? All problems are found, each with its line."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from tunesmith import plugins
from tunesmith.data.media import PARTS, beside
from tunesmith.data.section import SourceSection
from tunesmith.data.unusable import Unusable

LISTED = 1000  # problems that are kept; all are counted
LONGEST_LINE = 16 << 20
LEAST_ROWS = 10
EXTRAS = {"role", "content", "name", "tool_calls", "tool_call_id", "function_call", "refusal", "audio"}
ROLES = ("system", "user", "assistant", "tool", "function", "developer")
# A row's layout by its columns, and the training methods that take it.
METHODS = {
    "chat": ("supervised",),
    "completions": ("supervised",),
    "preference": ("dpo",),
    "reinforcement": ("reinforcement",),
    "rated": (),
    "text": (),
}
LAYOUTS = {"chat": "chat", "completions": "prompt", "preference": "preference", "rated": "rated", "text": "text"}


@dataclass(frozen=True)
class Problem:
    """What is wrong with a line (counted from 1)."""

    line: int
    message: str

    def as_dict(self) -> dict[str, Any]:
        return {"line": self.line, "message": self.message}


@dataclass
class Checked:
    """What a file holds. `kind` is of its rows, None where it has none."""

    kind: str | None = None
    rows: int = 0
    problems: list[Problem] = field(default_factory=list)
    wrong: int = 0

    def told(self) -> str:
        """The problems as a sentence."""
        shown = "; ".join(f"line {p.line}: {p.message}" for p in self.problems[:5])
        more = f"; and {self.wrong - 5:,} more" if self.wrong > 5 else ""
        return f"Invalid file format. {self.wrong:,} of {self.rows:,} lines can't be used: {shown}{more}."


class _Wrong(Exception):
    pass


def check(lines: Iterable[bytes]) -> Checked:
    """Look at every line of a JSONL file."""
    found, kinds = Checked(), Counter[str]()
    first: dict[str, int] = {}  # line of each kind's first row
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        found.rows += 1
        try:
            row = _parsed(line, number)
            kind = _kind(row)
            _check(kind, row)
            kinds[kind] += 1
            first.setdefault(kind, number)
        except _Wrong as error:
            found.wrong += 1
            if len(found.problems) < LISTED:
                found.problems.append(Problem(number, str(error)))
    if kinds:
        found.kind = kinds.most_common(1)[0][0]
        for kind in kinds.keys() - {found.kind}:
            found.wrong += kinds[kind]
            found.problems.append(Problem(first[kind], f"is a row of kind {kind} in a file of {found.kind} rows"))
    if not found.rows:
        found.wrong, found.problems = 1, [Problem(1, "the file is empty")]
    return found


def lines_of(file: Any) -> Iterator[bytes]:
    """A file's lines, none held in memory beyond the longest that is allowed."""
    while line := file.readline(LONGEST_LINE + 1):
        yield line
        if len(line) > LONGEST_LINE:  # told of once; the rest is passed over
            while line and not line.endswith(b"\n"):
                line = file.readline(LONGEST_LINE)


def _parsed(line: bytes, number: int) -> dict[str, Any]:
    if len(line) > LONGEST_LINE:
        raise _Wrong(f"is longer than {LONGEST_LINE >> 20} MiB")
    if number == 1:
        line = line.removeprefix(b"\xef\xbb\xbf")
    try:
        row = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _Wrong(f"is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _Wrong("is nested too deep") from None
    except ValueError as error:
        raise _Wrong(f"is not JSON ({error})") from None
    if not isinstance(row, dict):
        raise _Wrong(f"is {_type(row)}, not an object")
    return row


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key '{key[:80]}' is there twice")
        found[key] = value
    return found


def _kind(row: dict[str, Any]) -> str:
    if any(name in row for name in ("preferred_output", "preferred_completion", "chosen")):
        return "preference"
    if plugins.load("layout", "rated").fits(row):
        return "rated"
    if "messages" in row:
        messages = row["messages"]
        if isinstance(messages, list) and messages and isinstance(messages[-1], dict) and len(row) > 1:
            extra = set(row) - {"messages", "tools", "parallel_tool_calls", "functions", "response_format"}
            if messages[-1].get("role") == "user" and extra:
                return "reinforcement"
        return "chat"
    if "prompt" in row and "completion" in row:
        return "completions"
    if set(row) == {"text"}:
        return "text"
    raise _Wrong(f"has none of 'messages', 'prompt' and 'completion', 'preferred_output' (it has: {_keys(row)})")


def _check(kind: str, row: dict[str, Any]) -> None:
    if kind in ("chat", "reinforcement"):
        _messages(row["messages"], "message", answered=kind == "chat")
    if kind == "completions":
        for name in ("prompt", "completion"):
            if not isinstance(row[name], str) or (name == "completion" and not row[name]):
                raise _Wrong(f"'{name}' is {_type(row[name])}, not text")
    if kind == "preference" and "chosen" not in row:
        asked = row.get("input")
        if not isinstance(asked, dict) or "messages" not in asked:
            raise _Wrong("'input' is missing, or has no 'messages'")
        _messages(asked["messages"], "input message", answered=False)
        for name in ("preferred", "non_preferred"):
            ending = row.get(f"{name}_output", row.get(f"{name}_completion"))
            if not isinstance(ending, list) or not ending:
                raise _Wrong(f"'{name}_output' is missing, or no list of messages")
            _messages(ending, f"{name}_output message", answered=True)
    if kind in LAYOUTS:
        try:
            source = SourceSection(path="row")
            read = plugins.load("layout", LAYOUTS[kind]).read(row, source, "row")
            if found := [one.kind for one in read.media] + list(beside(row, source)):
                raise _Wrong(f"holds {found[0]}, which no method here learns from")
        except Unusable as error:
            raise _Wrong(str(error)) from None
        except (AttributeError, TypeError, KeyError) as error:
            raise _Wrong(f"can't be read ({type(error).__name__}: {error})") from None


def _messages(messages: Any, what: str, answered: bool) -> None:
    """A conversation's messages, counted from 1."""
    if not isinstance(messages, list) or not messages:
        raise _Wrong("'messages' is not a list of messages, or is empty")
    for number, message in enumerate(messages, 1):
        where = f"{what} {number}"
        if not isinstance(message, dict):
            raise _Wrong(f"{where} is {_type(message)}, not an object")
        if "role" not in message:
            raise _Wrong(f"{where}: Discriminator 'role' is missing in value")
        role = message["role"]
        if role not in ROLES:
            raise _Wrong(f"{where}: role {json.dumps(role)[:40]} is not one of {', '.join(ROLES)}")
        extra = set(message) - EXTRAS - ({"weight", "reasoning_content"} if role == "assistant" else set())
        if extra:
            raise _Wrong(f'{where} contains an extra "{min(extra)}"')
        if message.get("weight") not in (None, 0, 1):
            raise _Wrong(f"{where}: weight {json.dumps(message['weight'])[:40]} is not 0 or 1")
        called = message.get("tool_calls") or message.get("function_call")
        content = message.get("content")
        if content is None and not called:
            raise _Wrong(f"{where}: 'content' is missing")
        if isinstance(content, list) and any(isinstance(p, dict) and p.get("type") in PARTS for p in content):
            raise _Wrong(f"{where} holds an image or audio, which no method here learns from")
    if answered and not any(message["role"] == "assistant" for message in messages):
        raise _Wrong("has no message of the assistant, so nothing to learn")
    if answered and all(m.get("weight") == 0 for m in messages if m["role"] == "assistant"):
        raise _Wrong("all of the assistant's messages have weight 0, so nothing to learn")


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(str(key)[:40] for key in list(row)[:8]) or "nothing"


def _type(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
