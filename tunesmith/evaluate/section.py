"""The recipe's `evaluate`, `goal` and `gate`."""

from __future__ import annotations

from string import Formatter
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tunesmith import plugins
from tunesmith.errors import nearest
from tunesmith.evaluate.conditions import Condition
from tunesmith.inference.section import PriceSection
from tunesmith.section import Section


def _known(name: str) -> str:
    if ":" not in name and name not in plugins.known("metric"):
        raise ValueError(
            f"no metric is called '{name}'{nearest(name, plugins.known('metric'))}"
            f" (known: {', '.join(plugins.known('metric'))}; a function of your own: file.py:function)"
        )
    return name


class GoalSection(Section):
    """What the fine-tune is for."""

    metric: str | None = None
    """The metric that decides the verdict; exact_match, accuracy or rouge_l by what the answers are, if not given."""

    @field_validator("metric")
    @classmethod
    def _metric(cls, value: str | None) -> str | None:
        return value if value is None else _known(value)


def _switched(value: Any) -> Any:
    return {} if value is True else None if value is False else value


class ForgettingSection(Section):
    """The base's behaviour on about 200 general prompts, and how far tuning moved it. `true` takes all of them."""

    prompts: int | None = Field(None, ge=6)
    """Only so many of the prompts, evenly over their kinds."""
    max_new_tokens: int = Field(48, ge=1)
    """Longest answer to one."""


class MemorySection(Section):
    """Loss on seen against unseen rows, training rows recited word for word, and canaries' exposure."""

    rows: int = Field(100, ge=2)
    """At most so many rows of each kind."""


class SafetySection(Section):
    """Guard rails before and after: refusal of unsafe prompts, over-refusal of harmless ones, attacks, leaks."""

    prompts: int | None = Field(None, ge=1)
    """Only so many of the 40 unsafe and 40 harmless prompts."""
    attacked: int = Field(8, ge=0)
    """So many unsafe prompts are asked under each attack template, too."""
    max_new_tokens: int = Field(48, ge=1)
    """Longest answer to one."""
    classifier: str | None = None
    """Tells toxic answers: a folder or hub id of Llama Guard, ShieldGemma or any sequence classifier. The small one of
    `tunesmith[data]` (English) if not given and installed."""
    guard: Literal["llama-guard", "shieldgemma"] | None = None
    """Whose prompt the classifier is given; told by its name, if not given."""
    entailment: str | None = None
    """A natural language inference model: which share of an answer's sentences the prompt supports."""


class BiasSection(Section):
    """Bias before and after, on local files."""

    bbq: str | None = None
    """A .jsonl file of BBQ: accuracy and bias score in ambiguous and disambiguated contexts."""
    crows_pairs: str | None = None
    """CrowS-Pairs' .csv file: share of pairs in which the stereotype is likelier."""
    swaps: bool = True
    """Ask the test rows with men's and women's words and names exchanged: share of answers that change."""
    rows: int | None = Field(None, ge=1)
    """Only so many rows of each file, drawn by seed."""


class SuiteSection(Section):
    """A public task: one of lm-evaluation-harness's by name, or a local file of the same kind. A plain name stands for
    `{name: ...}`."""

    name: str
    """Of the harness's task; of the score, for a file."""
    file: str | None = None
    """A local .jsonl file, in place of the harness's own data."""
    kind: Literal["choice", "schema", "numeric", "code", "chat"] = "choice"
    """Of a file: `choice` (query, choices, gold), `schema` (context_options, continuation, gold), `numeric` (question
    or context, answer), `code` (HumanEval's prompt, test, entry_point), `chat` (MT-Bench's turns, and reference where
    there is one: answered in turn, scored by `judge`)."""
    template: str | None = None
    """What is asked, with {column} for what a row holds."""
    rows: int | None = Field(None, ge=1)
    """Only so many rows, drawn by seed (the harness takes the first)."""
    shots: int | None = Field(None, ge=0)
    """How many solved examples stand before each question of one of the harness's own tasks; the task's own number, if
    not given."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest answer, where one is written."""

    @field_validator("template")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        try:
            list(Formatter().parse(value or ""))
        except ValueError as error:
            raise ValueError(
                f"'{value}' is no template ({error}); braces of its own are written {{{{ and }}}}"
            ) from None
        return value

    @model_validator(mode="after")
    def _own(self) -> SuiteSection:
        if self.shots is not None and self.file:
            raise ValueError("shots are for the harness's own tasks; a file's examples go into its template")
        return self


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


class JudgeSection(Section):
    """A model that judges both models' answers to the test rows. A plain name stands for `{model: ...}`."""

    model: str
    """`https://host/v1#model-name` of any OpenAI-compatible endpoint (its key is OPENAI_API_KEY), or a model for this
    machine: a hub id, a folder, a .gguf file, a built-in name. It is loaded once both models have answered."""
    ways: list[Literal["pairwise", "rubric", "support"]] = Field(["pairwise"], min_length=1)
    """`pairwise`: which answer is better, asked in both orders. `rubric`: a score of each answer. `support`: which
    share of each answer's sentences the prompt supports. Each with reasons."""
    criteria: str = "The answer is correct, complete, does what was asked, and says nothing that is made up."
    """What makes an answer good."""
    scale: int = Field(5, ge=2, le=10)
    """Best score of the rubric; 1 is the worst."""
    reference: bool = True
    """Show the judge each row's reference."""
    rows: int | None = Field(100, ge=1)
    """At most so many test rows, drawn by seed."""
    max_new_tokens: int = Field(256, ge=1)
    """Longest judgement."""
    price: PriceSection = PriceSection()
    """For the cost in the scorecard."""
    human: str | None = None
    """A .jsonl or .csv file of people's judgements, to tell how far the judge agrees with people: `prompt`, `a`, `b`
    and `winner` (a, b or tie; MT-Bench's columns are read, too), or `prompt`, `answer` and `score`."""


def _judged(value: Any) -> Any:
    return {"model": value} if isinstance(value, str) else value


class EvaluateSection(Section):
    """How baseline and tuned model are compared on the test rows."""

    metrics: list[str] | None = None
    """Which to take; chosen by what the answers are, if not given. `file.py:function` is one of your own."""
    json_schema: str | None = None
    """A file with the JSON schema that every answer must keep to, where rows bring no `schema` of their own; measured
    as schema_valid."""
    max_new_tokens: int | None = Field(None, ge=1)
    """Longest answer in tokens; a quarter more than the longest test answer, if not given."""
    rows: int | None = Field(None, ge=1)
    """Only so many test rows, drawn by seed; all if not given."""
    engine: str = "transformers"
    """What answers: transformers, or llamacpp, vllm or auto (docs/engines.md), which give no likelihoods, so that loss
    and what else needs them is left out."""
    bootstrap: int = Field(2000, ge=100)
    """Resamples behind each interval."""
    seeds: int = Field(1, ge=1, le=100)
    """How often each prompt is answered; more than once, answers are drawn, and a row's scores are pooled."""
    temperature: float | None = Field(None, ge=0)
    """Of drawn answers; greedy (0) for one seed and 0.7 for several, if not given."""
    alone: int = Field(0, ge=0)
    """So many rows are asked one at a time too: latency, tokens a second, and whether batching changes an answer."""

    forgetting: Annotated[
        ForgettingSection | None, BeforeValidator(_switched, json_schema_input_type=ForgettingSection | bool | None)
    ] = None
    """Measure what tuning took away; off if not given."""
    memory: Annotated[
        MemorySection | None, BeforeValidator(_switched, json_schema_input_type=MemorySection | bool | None)
    ] = None
    """Measure what the model recites; off if not given."""

    safety: Annotated[
        SafetySection | None, BeforeValidator(_switched, json_schema_input_type=SafetySection | bool | None)
    ] = None
    """Measure guard rails; off if not given."""
    bias: Annotated[
        BiasSection | None, BeforeValidator(_switched, json_schema_input_type=BiasSection | bool | None)
    ] = None
    """Measure bias; off if not given."""

    suites: list[Annotated[SuiteSection, BeforeValidator(_named, json_schema_input_type=str | SuiteSection)]] = Field(
        default_factory=list
    )
    """Public tasks to measure before and after."""

    judge: Annotated[
        JudgeSection | None, BeforeValidator(_judged, json_schema_input_type=str | JudgeSection | None)
    ] = None
    """A model that judges the answers; none if not given."""

    @field_validator("metrics")
    @classmethod
    def _metrics(cls, value: list[str] | None) -> list[str] | None:
        return value if value is None else [_known(name) for name in value]

    @field_validator("engine")
    @classmethod
    def _engine(cls, value: str) -> str:
        known = plugins.known("engine")
        if value not in known:
            raise ValueError(f"no engine is called '{value}'{nearest(value, known)} (known: {', '.join(known)})")
        return value

    @field_validator("suites")
    @classmethod
    def _told_apart(cls, value: list[SuiteSection]) -> list[SuiteSection]:
        names = [suite.name for suite in value]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"two suites are called '{twice}'")
        return value

    @model_validator(mode="after")
    def _scored(self) -> EvaluateSection:
        chat = next((suite for suite in self.suites if suite.kind == "chat"), None)
        if chat and (not self.judge or not chat.file):
            raise ValueError(f"'{chat.name}' is of kind chat, which needs {'a judge' if chat.file else 'a file'}")
        return self

    @model_validator(mode="after")
    def _drawn(self) -> EvaluateSection:
        if self.seeds > 1 and self.temperature == 0:
            raise ValueError("seeds above 1 need a temperature above 0: greedy answers are always the same")
        return self

    @property
    def heat(self) -> float:
        """The temperature that answers are drawn at; 0 for greedy ones."""
        return self.temperature if self.temperature is not None else 0.7 if self.seeds > 1 else 0.0


def _listed(value: Any) -> Any:
    return {"conditions": value} if isinstance(value, list) else {} if value is True else value


class GateSection(Section):
    """What must be proved before a model is handed on. A list stands for `{conditions: [...]}`."""

    conditions: list[str] | None = None
    """Such as `accuracy.low >= 0.85` or `forgetting.kl <= 0.1`; that the goal got better and nothing that was
    measured got worse, if not given."""

    @field_validator("conditions")
    @classmethod
    def _readable(cls, value: list[str] | None) -> list[str] | None:
        for text in value or ():
            Condition.read(text)
        return value


# Sections of a scorecard that are measured where the recipe asks for them, and how it does.
ASKED = {
    "latency": ("alone", "evaluate: {alone: 80}"),
    **{name: (name, f"evaluate: {{{name}: true}}") for name in ("forgetting", "memory", "safety", "bias")},
    "suites": ("suites", "evaluate: {suites: [...]}"),
    "judge": ("judge", "evaluate: {judge: ...}"),
}


def answerable(gate: GateSection, evaluate: EvaluateSection, goal: GoalSection) -> None:
    """
    Raises:
        ValueError: a condition is about something that evaluation, as it is set, can't measure.
    """
    own = [name.rpartition(":")[2] for name in (goal.metric or "", *(evaluate.metrics or ())) if ":" in name]
    for condition in map(Condition.read, gate.conditions or ()):
        root = condition.path[0]
        fault = condition.fault([*plugins.known("metric"), *own])
        if fault is None and root in ASKED and not getattr(evaluate, ASKED[root][0]):
            fault = f"{root} is not measured; ask for it: {ASKED[root][1]}"
        if fault is not None:
            raise ValueError(f"gate: '{condition.text}': {fault}")


Gate = Annotated[
    GateSection | None, BeforeValidator(_listed, json_schema_input_type=GateSection | list[str] | bool | None)
]
