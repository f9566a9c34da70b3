"""Tools: how a model's template writes calls, and how calls are read back from what the model writes.

No families are listed here. The renderer is asked to write a call of a known tool; what stands before the call and
after it, and what its keys are called, is read off that text. For templates that write no tools there is a way of ours.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from tunesmith.conversation.message import Message
from tunesmith.conversation.render import Renderer
from tunesmith.serve.asked import Asked, Call, Deltas, Refused

PROBE = {"type": "function", "function": {"name": "known_tool", "arguments": {"zone": "x"}}}
TOOL = {
    "type": "function",
    "function": {
        "name": "known_tool",
        "description": "-",
        "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    },
}
OPEN, CLOSE = "<tool_call>", "</tool_call>"
SHOWN = (
    "You may call these tools, given as JSON schemas:\n{tools}\n"
    f'To call one, answer with {OPEN}{{{{"name": NAME, "arguments": {{{{...}}}}}}}}{CLOSE} and nothing else.'
)
XML_CALL = re.compile(r"<function=([^>]+)>(.*?)</function>", re.DOTALL)
XML_ARGUMENT = re.compile(r"<parameter=([^>]+)>\n?(.*?)\n?</parameter>", re.DOTALL)


@dataclass(frozen=True)
class Format:
    """How calls are written.

    Attributes:
        before: all that stands before the call's JSON, as the template writes it.
        open, close: the same as far as it is plain text: special tokens are not in a model's text.
        name, arguments: the keys of the call's JSON.
        native: whether the template writes tools itself.
    """

    before: str = OPEN
    open: str = OPEN
    close: str = CLOSE
    name: str = "name"
    arguments: str = "arguments"
    native: bool = False


_known: WeakKeyDictionary[Renderer, Format] = WeakKeyDictionary()


def format_of(renderer: Renderer) -> Format:
    """How a model's template writes calls."""
    if renderer not in _known:
        _known[renderer] = _read_off(renderer) if renderer.writes_tools else Format()
    return _known[renderer]


def _read_off(renderer: Renderer) -> Format:
    asked = (Message("user", "Hi"),)
    told = renderer.answer_text((*asked, Message("assistant", "", more={"tool_calls": [PROBE]})), [TOOL])
    if "<function=" in told:
        before, after = told.split("<function=", 1)[0], told.rsplit("</function>", 1)[-1]
        return Format(before, renderer.plain(before).strip(), renderer.plain(after).strip(), native=True)
    start = told.find("{")
    try:
        call, end = json.JSONDecoder().raw_decode(told[start:])
        keys = {str(value): key for key, value in call.items()}
        name = keys["known_tool"]
        arguments = next(k for k, v in call.items() if v in ({"zone": "x"}, '{"zone": "x"}'))
    except (ValueError, KeyError, AttributeError, StopIteration):
        return Format()  # written in a way of its own
    before, after = told[:start], told[start + end :]
    plain = renderer.plain(before).strip().removesuffix("[").strip()
    return Format(before, plain, renderer.plain(after).strip().removeprefix("]").strip(), name, arguments, native=True)


def prepared(asked: Asked, format: Format) -> Asked:
    """What is asked, as the model's template can write it. Where that writes no tools, a system message names them, and
    calls and their results become text."""
    if format.native or not (asked.tools or any(m.role == "tool" or m.more for m in asked.messages)):
        return asked if asked.tool_choice != "none" else replace(asked, tools=())
    messages = [_as_text(m) for m in asked.messages]
    if asked.tools and asked.tool_choice != "none":
        shown = SHOWN.format(tools="\n".join(json.dumps(t["function"], ensure_ascii=False) for t in asked.tools))
        first = messages[0] if messages and messages[0].role == "system" else None
        text = f"{first.content}\n\n{shown}" if first else shown
        messages = [Message("system", text), *messages[1 if first else 0 :]]
    return replace(asked, messages=tuple(messages), tools=())


def _as_text(message: Message) -> Message:
    if message.role == "tool":
        return Message("user", f"<tool_response>{message.content}</tool_response>")
    calls = [
        OPEN + json.dumps({k: call["function"][k] for k in ("name", "arguments")}, ensure_ascii=False) + CLOSE
        for call in message.more.get("tool_calls", ())
    ]
    return Message(message.role, "\n".join([message.content, *calls] if message.content else calls or [""]))


def forced(asked: Asked, format: Format) -> dict[str, Any] | None:
    """The JSON schema of the call that `tool_choice` asks for; None where a call is the model's own choice.

    Raises:
        Refused: it names a tool that is not there.
    """
    if asked.tool_choice in ("auto", "none"):
        return None
    named = asked.tool_choice[1] if isinstance(asked.tool_choice, tuple) else None
    chosen = [t["function"] for t in asked.tools if named in (None, t["function"]["name"])]
    if not chosen:
        what = f"tool_choice names the tool '{named}', which is not in tools" if named else "tool_choice needs tools"
        raise Refused(f"{what}.", param="tool_choice", code="unknown_tool")
    shared: dict[str, Any] = {}
    calls = [
        {
            "type": "object",
            "properties": {
                format.name: {"const": tool["name"]},
                format.arguments: _moved(tool.get("parameters") or {"type": "object"}, f"tool{number}", shared),
            },
            "required": [format.name, format.arguments],
            "additionalProperties": False,
        }
        for number, tool in enumerate(chosen)
    ]
    return (calls[0] if len(calls) == 1 else {"anyOf": calls}) | ({"$defs": shared} if shared else {})


def either(answer: dict[str, Any], calls: dict[str, Any]) -> dict[str, Any]:
    """The schema of an answer or a call, as `forced` has calls."""
    shared = dict(calls.get("$defs", {}))
    schemas = [_moved(answer, "answer", shared), {k: v for k, v in calls.items() if k != "$defs"}]
    return {"anyOf": schemas} | ({"$defs": shared} if shared else {})


def _moved(schema: dict[str, Any], name: str, shared: dict[str, Any]) -> dict[str, Any]:
    """A whole schema as a part of another one. References start at the root, so one that has any moves to the other's
    `$defs` (`shared`), where they are written anew."""
    found = _referred(schema, f"#/$defs/{name}")
    if found == schema:
        return schema
    shared[name] = {k: v for k, v in found.items() if k not in ("$id", "$schema")}
    return {"$ref": f"#/$defs/{name}"}


NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # their keys are anyone's
VALUES = ("const", "enum", "default", "examples")


def _referred(schema: Any, root: str, names: bool = False) -> Any:
    """A schema whose references to its own root ("#...") go to `root`."""
    if isinstance(schema, list):
        return [_referred(part, root) for part in schema]
    if not isinstance(schema, dict):
        return schema
    found: dict[str, Any] = {}
    for key, part in schema.items():
        if names:
            found[key] = _referred(part, root)
        elif key == "$ref" and isinstance(part, str) and part.startswith("#"):
            found[key] = root + part[1:]
        else:
            found[key] = part if key in VALUES else _referred(part, root, key in NAMED)
    return found


def new_call(name: str, arguments: Any) -> Call:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return Call(f"call_{secrets.token_hex(12)}", name, text)


class Reader:
    """Reads an answer as it comes: text, and calls of the tools that were offered."""

    def __init__(self, format: Format, tools: Sequence[Mapping[str, Any]]) -> None:
        self._format, self._names = format, {t["function"]["name"] for t in tools}
        self._held, self._inside = "", False
        self.called = False

    def feed(self, text: str, last: bool) -> tuple[str, list[Call]]:
        """The text that can be shown by now, and the calls that are complete."""
        self._held += text
        out, calls = "", []
        while True:
            if not self._inside:
                shown, self._inside = self._outside(last)
                out += shown
                if not self._inside:
                    break
            whole = self._whole(last)
            if whole is None:
                break
            found = self._calls(whole)
            if found:
                calls += found
                self.called = True
            else:
                out += whole  # something else that looked like a call
            self._inside = False
        if self.called and not out.strip():
            out = ""  # blanks around calls
        return out, calls

    def _outside(self, last: bool) -> tuple[str, bool]:
        """Text before a call may begin, and whether one does."""
        open = self._format.open
        if not open:  # calls are bare JSON, and then all that there is
            if self._held.lstrip()[:1] in ("{", "["):
                return "", True
            if not self._held.strip() and not last:
                return "", False
            shown, self._held = self._held, ""
            return shown, False
        at = self._held.find(open)
        if at >= 0:
            shown, self._held = self._held[:at], self._held[at:]
            return shown, True
        keep = 0 if last else next((k for k in range(len(open) - 1, 0, -1) if self._held.endswith(open[:k])), 0)
        shown, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return shown, False

    def _whole(self, last: bool) -> str | None:
        """The call's text with its marks, once it is complete."""
        format = self._format
        if format.close:
            end = self._held.find(format.close, len(format.open))
            if end >= 0:
                end += len(format.close)
                whole, self._held = self._held[:end], self._held[end:]
                return whole
        if not last:
            return None
        whole, self._held = self._held, ""
        return whole or None

    def _calls(self, whole: str) -> list[Call]:
        inner = whole.removeprefix(self._format.open).removesuffix(self._format.close or "\0").strip()
        calls: list[tuple[Any, Any]] = []
        for name, body in XML_CALL.findall(inner):
            calls.append((name.strip(), {k.strip(): _value(v) for k, v in XML_ARGUMENT.findall(body)}))
        if not calls:
            calls = [(c.get(self._format.name), c.get(self._format.arguments, {})) for c in _objects(inner)]
        if not calls or any(not isinstance(name, str) or name not in self._names for name, _ in calls):
            return []
        try:
            return [new_call(name, arguments) for name, arguments in calls]
        except RecursionError:  # nested too deep to be anything
            return []


def _objects(text: str) -> list[dict[str, Any]]:
    """JSON objects one after another, in a list or apart by blanks, commas or semicolons."""
    found: list[dict[str, Any]] = []
    decoder, text = json.JSONDecoder(), text.strip()
    while text:
        try:
            value, end = decoder.raw_decode(text)
        except (ValueError, RecursionError):
            return []
        values = value if isinstance(value, list) else [value]
        if not all(isinstance(v, dict) for v in values):
            return []
        found += values
        text = text[end:].lstrip(" \n\r\t,;")
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def read_calls(deltas: Deltas, reader: Reader, parallel: bool, prefix: str = "") -> Deltas:
    """Deltas with the calls in their text read as such. `prefix` was written for the model and belongs to a call."""
    held: tuple[Any, ...] = ()
    called = 0
    async with aclosing(deltas):
        async for delta in deltas:
            text, calls = reader.feed(prefix + delta.text, delta.finish is not None)
            prefix = ""
            if not parallel:
                calls = calls[: max(0, 1 - called)]
            called += len(calls)
            held += delta.logprobs
            shown = held if text or delta.finish else ()
            held = () if shown else held
            finish = "tool_calls" if delta.finish == "stop" and called else delta.finish
            yield replace(delta, text=text, calls=tuple(calls), logprobs=shown, finish=finish)
