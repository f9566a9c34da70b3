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
from tunesmith.errors import DataError
from tunesmith.evaluate.metrics.base import same
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Ask, Reply
from tunesmith.progress import bar
from tunesmith.runs import write_text
from tunesmith.section import Section


class Case(Section):
    """One golden case: a prompt (or several messages), and what must hold of its answer."""

    name: str
    prompt: str | None = None
    system: str | None = None
    messages: list[dict[str, str]] | None = None
    equals: str | None = None
    contains: list[str] | str | None = None
    lacks: list[str] | str | None = None
    matches: str | None = None
    max_new_tokens: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _whole(self) -> Case:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("a case has either a prompt or messages")
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
            return Ask(tuple(Message(m["role"], m["content"]) for m in self.messages))
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
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        cases = [Case.model_validate(case) for case in read["cases"]]
    except FileNotFoundError as error:
        raise DataError("no such file", where=str(path), fix="Add cases: tunesmith golden RUN ROW.") from error
    except ValidationError as error:
        first = error.errors()[0]
        what = f"{'.'.join(map(str, first['loc'])) or 'case'}: {first['msg'].removeprefix('Value error, ')}"
        raise DataError(what, where=str(path), fix="See docs/evaluation.md.") from None
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise DataError(f"is not a suite ({error})", where=str(path), fix="It holds `cases: [...]`.") from error
    names = [case.name for case in cases]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"two cases are called '{twice}'", where=str(path), fix="Rename one.")
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
    """Add a row of a run's answers as a case that must equal its reference; returns the case's name."""
    read = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    cases = (read or {}).get("cases", [])
    name = str(line["id"])
    cases = [case for case in cases if case.get("name") != name]
    messages = [{"role": m["role"], "content": m["content"]} for m in line["prompt"]]
    cases.append({"name": name, "messages": messages, "equals": line["reference"]})
    write_text(path, yaml.safe_dump({"cases": cases}, sort_keys=False, allow_unicode=True))
    return name
