"""The recipe's `data`."""

from __future__ import annotations

import re
import string
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tunesmith import plugins
from tunesmith.errors import nearest
from tunesmith.section import Section

MARKS = ("tag", "weight", "columns")  # a row's metadata that are the recipe's, not its own


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
    completion: str | None = None
    """The column that is to be answered."""
    label: str | None = None
    """A column that says of the completion whether it is good: true or false."""
    chosen: str | None = None
    """The better of two answers."""
    rejected: str | None = None
    """The worse of two answers."""
    text: str | None = None
    """Plain text to go on learning from."""
    context: str | None = None
    """A column put before the prompt."""
    system: str | None = None
    """A column with the row's own system prompt."""
    image: str | None = None
    """A column with one image or several: paths, addresses or their bytes."""
    audio: str | None = None
    """A column with one sound or several."""

    @property
    def judged(self) -> bool:
        """Whether rows are pairs of answers, or rated ones."""
        return self.chosen is not None or self.label is not None

    @model_validator(mode="after")
    def _one_kind(self) -> ColumnsSection:
        given = [name for name, column in self if column is not None]
        if self.text is not None and len(given) > 1:
            raise ValueError(f"`text` is plain text, with no `{next(n for n in given if n != 'text')}` beside it")
        if (self.chosen is None) != (self.rejected is None):
            raise ValueError("`chosen` and `rejected` go together")
        if self.chosen is not None and (self.completion is not None or self.label is not None):
            raise ValueError("`chosen` and `rejected` are the answers; leave `completion` and `label` out")
        if self.completion is None and self.chosen is None and self.text is None:
            raise ValueError("`columns` needs an answer: `completion`, or `chosen` and `rejected`; or `text` alone")
        return self


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
    media_folder: str | None = None
    """What the paths of images and sounds are relative to, and lie in; the source's own folder if not given."""
    keep: list[str] = Field(default_factory=list)
    """Columns that rows keep as metadata: to slice scores by, or for metrics (choices, schema, database, tests)."""
    where: dict[str, str | int | float | bool | list[str | int | float | bool]] = Field(default_factory=dict)
    """Keep only rows whose column has this value (or one of these); the others are counted as removed."""

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        known = ["auto", *plugins.known("reader")]
        if value not in known:
            raise ValueError(f"no format is called '{value}'{nearest(value, known)}; known: {', '.join(known)}")
        return value

    @field_validator("keep")
    @classmethod
    def _not_ours(cls, value: list[str]) -> list[str]:
        ours = next((name for name in value if name in MARKS), None)
        if ours is not None:
            raise ValueError(f"rows have a '{ours}' of their own as metadata; give the column another name")
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
        if self.columns and self.columns.text is not None and self.template is not None:
            raise ValueError("a template has nothing to fill in plain text: leave it or `columns.text` out")
        if self.columns and self.columns.completion and self.columns.prompt is None and self.template is None:
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
    by: str | None = None
    """A column, as customer_id: rows of one value stay on one side. A row without it is on its own."""
    stratify: str = "auto"
    """What is given its share on every side: `label` (the answer), a column, `none`; labels if `auto`."""
    near: float | None = Field(0.8, gt=0, le=1)
    """Rows whose questions are at least so alike (Jaccard similarity of runs of three words) stay on one side; null
    looks at equal questions alone."""
    time: str | None = None
    """A column of times: the newest rows are the test, those before them validation."""

    @model_validator(mode="after")
    def _possible(self) -> SplitSection:
        parts = [p for p in (self.validation, self.test) if not isinstance(p, str)]
        if any(p < 0 or (p >= 1 and p != int(p)) for p in parts) or sum(p for p in parts if p < 1) >= 1:
            raise ValueError("a part is a share of the rows (together below 1), a whole count, or a path")
        if self.time is not None and self.stratify not in ("auto", "none"):
            raise ValueError("rows split by `time` can't be stratified too")
        return self


class BalanceSection(Section):
    """How large the classes of the training rows are to be."""

    by: str = "label"
    """What makes a class: `label` (the answer), `tag`, or a column."""
    how: Literal["repeat", "drop", "count", "weight"] = "repeat"
    """repeat rows of small classes up to the largest; drop rows of large ones down to the smallest; count: `rows` of
    each; weight: rows stay, and each class's answers weigh the same in the loss altogether."""
    rows: int | None = Field(None, ge=1)
    """Rows of each class, for `how: count`."""
    cap: float = Field(10.0, ge=1)
    """No row is there more often, or weighs more, than this many times."""

    @model_validator(mode="after")
    def _counted(self) -> BalanceSection:
        if (self.how == "count") != (self.rows is not None):
            raise ValueError("`rows` and `how: count` go together")
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
    media: Literal["keep", "drop", "words"] = "keep"
    """For rows with images or sounds, which no method here learns from: keep them (to prepare a set for other tools;
    training refuses it); leave them out; or take their words alone."""
    over_length: Literal["error", "drop", "truncate", "split"] = "error"
    """For rows longer than `train.max_length`: stop; leave out; cut the end of the longest message that is
    not an answer; cut between turns into several rows."""
    canaries: int = Field(0, ge=0, le=100)
    """Plant so many secrets among the training rows; `evaluate.memory` then measures what of them is given away."""
    canary_repeats: int = Field(4, ge=1)
    """How often each secret stands there."""
    max_rejected: float = Field(0.0, ge=0, le=1)
    """Share of rows that may be unusable before the stage stops. They are listed in rejected.jsonl."""
    clean: plugins.table("clean") = {}  # type: ignore[valid-type]
    """Cleaning steps, in order: `name: true`, or with settings; see docs/cleaning.md. None unless named."""
    augment: list[plugins.field("augment")] = []  # type: ignore[valid-type]
    """More training rows, each made in one way by `kind`: typos, case, noise, paraphrase, synthesise."""
    balance: BalanceSection | None = None
    """Class sizes of the training rows; as they are if not given."""
    engine: plugins.field("data_engine") = "local"  # type: ignore[valid-type]
    """Who does the work: local (this machine's processes), ray, spark; with settings as `{kind: ray, address: ...}`."""
    mix: dict[str, Annotated[float, Field(gt=0, le=1)]] = Field(default_factory=dict)
    """Shares of an epoch by tag, as {mine: 0.8, general: 0.2}. The largest share's rows are all there, once."""

    @model_validator(mode="after")
    def _tagged(self) -> DataSection:
        tags = [source.tag for source in self.sources]
        if self.mix:
            if abs(sum(self.mix.values()) - 1) > 1e-6:
                raise ValueError("the shares of `mix` must sum to 1")
            absent = next((tag for tag in self.mix if tag not in tags), None)
            if absent is not None:
                known = [tag for tag in tags if tag]
                raise ValueError(f"no source has the tag '{absent}' of `mix`{nearest(absent, known)}")
            if any(tag not in self.mix for tag in tags):
                raise ValueError("with `mix`, every source needs a tag that it names; the others' rows would be lost")
        return self

    @property
    def columns_named(self) -> dict[str, str]:
        """Columns of the sources that shaping looks at, by the key that names each."""
        named = {"split.by": self.split.by, "split.time": self.split.time}
        if self.split.stratify not in ("auto", "label", "none"):
            named["split.stratify"] = self.split.stratify
        if self.balance is not None and self.balance.by not in ("label", "tag"):
            named["balance.by"] = self.balance.by
        return {key: name for key, name in named.items() if name is not None}

    @property
    def columns_kept(self) -> set[str]:
        return set(self.columns_named.values())
