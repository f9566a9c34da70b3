"""Rows whose columns the recipe names: of any of the four kinds."""

from __future__ import annotations

from tunesmith.conversation.message import Conversation, Message, Text
from tunesmith.data.judged import PreferencePair, RatedAnswer
from tunesmith.data.layouts import Layout, Row, joined, lacks, system_in, text_in, tools
from tunesmith.data.section import SourceSection

OURS = ("system", "prompt", "completion", "label", "chosen", "rejected")


class Columns(Layout):
    """Any columns, named in the recipe: a question and its answer, rated where a `label` is named; or `chosen` and
    `rejected`; or `text`."""

    name, needs = "columns", "the columns that the recipe names"

    @classmethod
    def fits(cls, row: Row) -> bool:
        return False  # only ever named, never guessed

    @classmethod
    def read(cls, row: Row, source: SourceSection, where: str) -> Conversation:
        named = source.columns
        assert named is not None  # the section refuses layout columns without them
        if named.text is not None:
            return Text((), where, text=text_in(row, named.text))
        before = [column for column in (named.context, named.prompt) if column]
        if named.judged:
            theirs = {ours: column for ours in OURS if (column := getattr(named, ours)) is not None}
            absent = next((c for ours, c in theirs.items() if ours != "system" and row.get(c) is None), None)
            if absent is not None:
                raise lacks(row, absent)
            ours = {name: row.get(column) for name, column in theirs.items()} | {"tools": list(tools(row))}
            if source.template is not None or named.context is not None:
                ours["prompt"] = joined(row, before, source)
            return (PreferencePair if named.chosen else RatedAnswer).read(ours, source, where)
        assert named.completion is not None  # nor are there columns without an answer
        system = system_in(row, named.system) if named.system else []
        asked = Message("user", joined(row, before, source))
        answer = Message("assistant", text_in(row, named.completion))
        return Conversation((*system, asked, answer), where, tools=tools(row))
