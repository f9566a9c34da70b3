"""Layouts of rows in which somebody judged answers: pairs of a better and a worse one, and rated ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from tunesmith.conversation.message import Conversation, Message, Preference, Rated
from tunesmith.data.layouts import COMPLETIONS, Layout, Row, system_in, text_in, tools, turns
from tunesmith.data.section import SourceSection
from tunesmith.data.unusable import Unusable
from tunesmith.data.values import is_text

TURN = re.compile(r"\n\n(Human|Assistant):")


class PreferencePair(Layout):
    """A better and a worse answer: TRL's `prompt`, `chosen`, `rejected` (texts or messages; the prompt may be only in
    both answers), HH-RLHF's transcripts, LLaMA-Factory's `conversations` or `instruction` with `chosen` and
    `rejected`, and OpenAI's `input`, `preferred_output`, `non_preferred_output` (`..._completion` in
    older files). An optional `margin`."""

    name, needs, takes_template = "preference", "chosen and rejected, or preferred_output", False
    ENDINGS: ClassVar[tuple[tuple[str, str], ...]] = (
        ("chosen", "rejected"),
        ("preferred_output", "non_preferred_output"),
        ("preferred_completion", "non_preferred_completion"),
    )

    @classmethod
    def fits(cls, row: Row) -> bool:
        return any(better in row and worse in row for better, worse in cls.ENDINGS)

    @classmethod
    def read(cls, row: Row, source: SourceSection, where: str) -> Conversation:
        names = next((pair for pair in cls.ENDINGS if all(name in row for name in pair)), None)
        if names is None:
            raise Unusable("lacks_field", f"lacks 'chosen' and 'rejected' (it has: {', '.join(row) or 'nothing'})")
        prompt = _prompt(row)
        chosen, rejected = ([*prompt, *_ending(row[name])] for name in names)
        shared = _alike(chosen, rejected)
        better, worse = tuple(chosen[shared:]), tuple(rejected[shared:])
        if not better or not worse:
            raise Unusable("same_endings", "one answer holds all of the other")
        margin = row.get("margin")
        if margin is not None and not _is_number(margin):
            raise Unusable("bad_margin", f"margin {margin!r} is not a number")
        return Preference(
            tuple(chosen),
            where,
            tools=tools(row.get("input") if isinstance(row.get("input"), dict) else row),  # type: ignore[arg-type]
            rejected=worse,
            shared=shared,
            margin=None if margin is None else float(margin),
        )


class RatedAnswer(Layout):
    """An answer with a verdict: TRL's `prompt`, `completion`, `label` (true or false), or `messages` or
    `conversations` with one."""

    name, needs, takes_template = "rated", "a conversation (or prompt and completion) and label: true or false", False
    VERDICTS: ClassVar[tuple[str, ...]] = ("label", "kto_tag")

    @classmethod
    def fits(cls, row: Row) -> bool:
        judged = any(isinstance(row.get(name), bool) for name in cls.VERDICTS)
        return judged and any(name in row for name in ("messages", "conversations", "prompt", "instruction"))

    @classmethod
    def read(cls, row: Row, source: SourceSection, where: str) -> Conversation:
        good = next((row[name] for name in cls.VERDICTS if row.get(name) is not None), None)
        if isinstance(good, str):  # as CSV has it
            good = {"true": True, "false": False}.get(good.strip().lower(), good)
        if not isinstance(good, bool):
            raise Unusable("no_verdict", f"lacks a 'label' that is true or false, not {good!r}")
        messages = _prompt(row)
        if "prompt" in row or "instruction" in row:
            answer = next((row[name] for name in COMPLETIONS if name in row), None)
            messages = [*messages, *_ending(answer)]
        return Rated(tuple(messages), where, tools=tools(row), good=good)


def _prompt(row: Row) -> list[Message]:
    """What a row's answers follow, whichever column holds it."""
    system = system_in(row, "system")
    for name in ("messages", "conversations", "input", "prompt"):
        found = row.get(name)
        if isinstance(found, dict):  # OpenAI's input
            found = found.get("messages")
        if isinstance(found, list):
            return system + turns(found)
    if row.get("prompt") is not None:
        asked = text_in(row, "prompt")
        return system + (_transcript(asked) or [Message("user", asked)])
    if row.get("instruction") is not None:
        asked = "\n\n".join(text_in(row, name) for name in ("instruction", "input") if row.get(name))
        return [*system, Message("user", asked)]
    return system


def _ending(value: Any) -> list[Message]:
    """An answer: a text, a transcript, one message or several."""
    if is_text(value):
        return _transcript(value) or [Message("assistant", value)]
    if isinstance(value, dict):
        return turns([value])
    if isinstance(value, list) and value:
        return turns(value)
    raise Unusable("bad_message", f"an answer is {type(value).__name__}, not text or messages")


def _transcript(text: str) -> list[Message] | None:
    """Anthropic's "\\n\\nHuman: ...\\n\\nAssistant: ..." as messages; None where the text is none."""
    before, *pieces = TURN.split(text)
    if before.strip() or "Human" not in pieces[::2]:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [Message(roles[who], said.strip()) for who, said in zip(pieces[::2], pieces[1::2], strict=True)]


def _alike(one: Sequence[Message], other: Sequence[Message]) -> int:
    """How many messages both begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
