"""A regression suite: golden cases that every version of a model must pass.

cases:
  - name: refund
    system: Triage.               # optional
    prompt: I want my money back.
    equals: '{"intent": "refund"}'   # or contains, lacks, matches (a regular expression)
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from tunesmith.conversation.message import Message
from tunesmith.errors import DataError, first_line
from tunesmith.evaluate.metrics.base import same
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Ask, Reply
from tunesmith.progress import bar
from tunesmith.runs import write_text
from tunesmith.section import Section


def _said(message: dict[str, Any]) -> bool:
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


class Case(Section):
    """One golden case: a prompt (or several messages), and what must hold of its answer."""

    name: str
    prompt: str | None = None
    system: str | None = None
    messages: list[dict[str, Any]] | None = None
    equals: str | None = None
    contains: list[str] | str | None = None
    lacks: list[str] | str | None = None
    matches: str | None = None
    max_new_tokens: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _whole(self) -> Case:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a case has either a prompt or messages")
        if self.messages is not None and not (self.messages and all(map(_said, self.messages))):
            raise ValueError("messages are a list of {role: ..., content: ...}, at least one")
        if all(x is None for x in (self.equals, self.contains, self.lacks, self.matches)):
            raise ValueError("a case says what must hold: equals, contains, lacks or matches")
        try:
            re.compile(self.matches or "")
        except re.error as error:
            raise ValueError(f"matches is not a regular expression ({error})") from error
        return self

    @property
    def ask(self) -> Ask:
        if self.messages is not None:
            return Ask(tuple(map(Message.from_dict, self.messages)))
        return Ask.user(self.prompt or "", self.system)

    def judge(self, answer: str) -> str:
        """What is wrong with an answer; nothing if it passes."""
        wanted, refused = ([x] if isinstance(x, str) else x or [] for x in (self.contains, self.lacks))
        if self.equals is not None and not same(answer, self.equals):
            return f"is not {self.equals!r} but {answer[:200]!r}"
        for text in wanted:
            if text.lower() not in answer.lower():
                return f"lacks {text!r}: {answer[:200]!r}"
        for text in refused:
            if text.lower() in answer.lower():
                return f"holds {text!r}: {answer[:200]!r}"
        if self.matches is not None and not re.search(self.matches, answer):
            return f"does not match {self.matches!r}: {answer[:200]!r}"
        return ""


def load(path: Path) -> list[Case]:
    """A suite's cases.

    Raises:
        DataError: names the case and key.
    """
    read = _cases(path)
    if not read:
        raise DataError("holds no cases", where=str(path), fix="Add one: tunesmith golden RUN ROW.")
    try:
        cases = [Case.model_validate(case) for case in read]
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc'])) or 'case'}: {first['msg'].removeprefix('Value error, ')}"
        raise DataError(what, where=str(path), fix="See docs/evaluation.md.") from None
    names = [case.name for case in cases]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two cases are called '{twice}'", where=str(path), fix="Rename one.")
    return cases


def _cases(path: Path) -> list[Any]:
    """What a suite's file holds under `cases`.

    Raises:
        DataError: it can't be read, or is no suite.
    """
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(path), fix="Add cases: tunesmith golden RUN ROW.") from error
    except (OSError, UnicodeDecodeError, RecursionError, yaml.YAMLError) as error:
        what = f"is not a suite ({first_line(error)})"
        raise DataError(what, where=str(path), fix="It holds `cases: [...]`, as YAML in UTF-8.") from error
    cases = read.get("cases") if isinstance(read, dict) else None
    if not isinstance(cases, list):
        raise DataError("is not a suite: it has no list of cases", where=str(path), fix="It holds `cases: [...]`.")
    return cases


def check(cases: list[Case], subject: Kept) -> list[dict[str, Any]]:
    """Each case with whether it passed: {name, passed, why, answer}."""
    found: dict[str, Reply] = {}
    with bar("Golden cases", len(cases)) as progress:
        for limit in sorted({case.max_new_tokens for case in cases}):
            part = [case for case in cases if case.max_new_tokens == limit]
            replies = subject.replies([case.ask for case in part], limit, progress.advance)
            found |= {case.name: reply for case, reply in zip(part, replies, strict=True)}
    told = []
    for case in cases:
        reply = found[case.name]
        why = f"was not answered: {reply.failure}" if reply.failure else case.judge(reply.text)
        told.append({"name": case.name, "passed": not why, "why": why or "passed", "answer": reply.text})
    return told


def add(path: Path, line: dict[str, Any]) -> str:
    """Add a row of a run's answers as a case that must equal its reference; returns the case's name.

    Raises:
        DataError: the file is there and no suite, or the row asks nothing.
    """
    name = str(line["id"])
    if not line["prompt"]:
        raise DataError("is a text that asks nothing, so nothing can be checked", where=name, fix="Take another row.")
    empty = not path.exists() or path.stat().st_size == 0
    cases = [
        case for case in ([] if empty else _cases(path)) if not (isinstance(case, dict) and case.get("name") == name)
    ]
    cases.append({"name": name, "messages": line["prompt"], "equals": line["reference"]})
    write_text(path, yaml.safe_dump({"cases": cases}, sort_keys=False, allow_unicode=True))
    return name
