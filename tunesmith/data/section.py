"""The recipe's `data`."""

from __future__ import annotations

import re
import string
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tunesmith import plugins
from tunesmith.errors import nearest
from tunesmith.section import Section


def placeholders(template: str) -> list[tuple[str, str | None]]:
    """A template as [(text, the column that follows it, or None), ...]; {{ and }} stand for braces.

    Raises:
        ValueError: a brace that is not closed, or more in it than a column's name.
    """
    found = []
    for text, name, spec, conversion in string.Formatter().parse(template):
        if name == "" or spec or conversion:
            raise ValueError("only {column} can stand in a template; a brace itself is written {{ or }}")
        found.append((text, name))
    return found


def is_url(path: str) -> bool:
    return "://" in path


class ColumnsSection(Section):
    """Which column holds what, for rows of no known layout."""

    prompt: str | None = None
    """The column that the user says."""
    completion: str
    """The column that is to be answered."""
    context: str | None = None
    """A column put before the prompt."""
    system: str | None = None
    """A column with the row's own system prompt."""


class SourceSection(Section):
    """Where rows lie: files, a hub data set, or a database. A plain string stands for `{path: ...}`."""

    path: str | None = Field(None, min_length=1)
    """A file or several: relative to the recipe, may hold * and ${VARIABLES}; or a URL (https://, s3://, gs://)."""
    hub: str | None = None
    """A data set of the hub, as owner/name; in place of `path`."""
    split: str | None = None
    """Of the hub's data set; train if not given."""
    subset: str | None = None
    """Of the hub's data set, where it has several."""
    revision: str | None = None
    """Of the hub's data set: a commit, tag or branch. What `main` was is written into the manifest."""
    sql: str | None = None
    """A database, as an SQLAlchemy URL; in place of `path`. Passwords come from ${VARIABLES}."""
    query: str | None = None
    """What the database is asked."""
    format: str = "auto"
    """Of the files: jsonl, json, csv, tsv, parquet, arrow, txt, paragraphs, document, md, html, pdf, docx, conll,
    label_studio; by ending and content if `auto`. A further .gz or .zst is unpacked."""
    tag: str | None = None
    """A name for this source's rows, for `data.mix` and `data.balance`."""
    weight: float = Field(1.0, gt=0, le=1000)
    """How often an epoch has each of its training rows: 2 twice, 0.5 a half of them, drawn by the seed."""
    layout: str = "auto"
    """Of the rows: chat, sharegpt, instruction, prompt, question, text, preference, rated, columns; detected if
    `auto`."""
    columns: ColumnsSection | None = None
    """For rows of no known layout."""
    template: str | None = None
    """The user's message, with {column} for what a row holds; in place of the layout's own."""
    system: str | None = None
    """A system prompt for this source's rows that have none; in place of `data.system`."""
    where: dict[str, str | int | float | bool | list[str | int | float | bool]] = Field(default_factory=dict)
    """Keep only rows whose column has this value (or one of these); the others are counted as removed."""

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        known = ["auto", *plugins.known("reader")]
        if value not in known:
            raise ValueError(f"no format is called '{value}'{nearest(value, known)}; known: {', '.join(known)}")
        return value

    @field_validator("path", "sql")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        password = re.search(r"://[^/@:]*:([^/@]+)@", value or "")
        if password and "$" not in password[1]:
            raise ValueError("a password would be copied into every run; write ${A_VARIABLE} in its place")
        return value

    @field_validator("layout")
    @classmethod
    def _known_layout(cls, value: str) -> str:
        known = ["auto", *plugins.known("layout")]
        if value not in known:
            raise ValueError(f"no layout is called '{value}'{nearest(value, known)}; known: {', '.join(known)}")
        return value

    @field_validator("template")
    @classmethod
    def _fillable(cls, value: str | None) -> str | None:
        fields = placeholders(value) if value is not None else []
        if value is not None and not any(name for _, name in fields):
            raise ValueError("a template names the row's columns in braces, as in 'Classify: {text}'")
        return value

    @model_validator(mode="after")
    def _fits(self) -> SourceSection:
        if sum(place is not None for place in (self.path, self.hub, self.sql)) != 1:
            raise ValueError("a source is one of `path`, `hub` and `sql`")
        if (self.sql is None) != (self.query is None):
            raise ValueError("`sql` and `query` go together")
        if self.hub is None and (self.split or self.subset or self.revision):
            raise ValueError("`split`, `subset` and `revision` belong to a `hub` data set")
        if self.columns and self.layout not in ("auto", "columns"):
            raise ValueError(f"`columns` and layout {self.layout} exclude each other; leave one out")
        if self.template is not None and self.layout in ("chat", "sharegpt"):
            raise ValueError(f"a template has nothing to fill in rows of layout {self.layout}")
        if self.layout == "columns" and self.columns is None:
            raise ValueError("layout columns needs `columns: {prompt: ..., completion: ...}`")
        if self.columns and self.columns.prompt is None and self.template is None:
            raise ValueError("`columns` needs a prompt column, or a `template` beside it")
        return self


def _source(value: Any) -> Any:
    return {"path": value} if isinstance(value, str) else value


class SplitSection(Section):
    """Rows held out of training: a share (below 1), a count, or a file of their own."""

    validation: int | float | str = 0.1
    """Watched during training: 0.1, 200, or a path."""
    test: int | float | str = 0.1
    """For the proof at the end: 0.1, 200, or a path."""

    @model_validator(mode="after")
    def _possible(self) -> SplitSection:
        parts = [p for p in (self.validation, self.test) if not isinstance(p, str)]
        if any(p < 0 or (p >= 1 and p != int(p)) for p in parts) or sum(p for p in parts if p < 1) >= 1:
            raise ValueError("a part is a share of the rows (together below 1), a whole count, or a path")
        return self


class DataSection(Section):
    """Where rows come from and how they are split."""

    sources: list[Annotated[SourceSection, BeforeValidator(_source, json_schema_input_type=str | SourceSection)]] = (
        Field(min_length=1)
    )
    """The files."""
    system: str | None = None
    """A system prompt for rows that have none."""
    split: SplitSection = SplitSection()
    """What is held out."""
    answers: Literal["auto", "json", "label", "text"] = "auto"
    """What the answers are; decides which metrics fit, and whether the split is stratified."""
    over_length: Literal["error", "drop", "truncate", "split"] = "error"
    """For rows longer than `train.max_length`: stop; leave out; cut the end of the longest message that is
    not an answer; cut between turns into several rows."""
    max_rejected: float = Field(0.0, ge=0, le=1)
    """Share of rows that may be unusable before the stage stops. They are listed in rejected.jsonl."""
