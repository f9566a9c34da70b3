"""Every extension point, on one screen.

A plugin is a name in a recipe (`kind: lora`) that stands for an object in a module. Built-ins are in the
table below; other packages add theirs as entry points of the group `tunesmith.<point>`. Modules are only
imported when their name is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Annotated, Any

from pydantic import BeforeValidator, SerializeAsAny, WithJsonSchema

from tunesmith.errors import RecipeError, nearest
from tunesmith.section import Section

BUILT_IN: dict[str, dict[str, str]] = {
    # A training method: `train.method`. A Method (tunesmith/train/objectives/method.py).
    "objective": {
        "sft": "tunesmith.train.objectives.sft:Sft",
        "text": "tunesmith.train.objectives.text:PlainText",
        "dpo": "tunesmith.train.objectives.dpo:Dpo",
        "cpo": "tunesmith.train.objectives.cpo:Cpo",
        "simpo": "tunesmith.train.objectives.simpo:SimPo",
        "orpo": "tunesmith.train.objectives.orpo:Orpo",
        "kto": "tunesmith.train.objectives.kto:Kto",
        "reward": "tunesmith.train.objectives.reward:Reward",
        "classify": "tunesmith.train.objectives.classify:Classify",
        "distill": "tunesmith.train.objectives.distill:Distill",
    },
    # What is trained of a model: `train.adapter`. An Adapter (train/adapters/adapter.py), and, where not all of it is
    # trained at every step, trained_at(step, names, seed).
    "adapter": {
        "lora": "tunesmith.train.adapters.lora:Lora",
        "loha": "tunesmith.train.adapters.others:LoHa",
        "lokr": "tunesmith.train.adapters.others:LoKr",
        "vera": "tunesmith.train.adapters.others:Vera",
        "oft": "tunesmith.train.adapters.others:Oft",
        "boft": "tunesmith.train.adapters.others:Boft",
        "ia3": "tunesmith.train.adapters.others:Ia3",
        "adalora": "tunesmith.train.adapters.adalora:AdaLora",
        "prompt": "tunesmith.train.adapters.prompts:Prompt",
        "p-tuning": "tunesmith.train.adapters.prompts:PTuning",
        "prefix": "tunesmith.train.adapters.prompts:Prefix",
        "bottleneck": "tunesmith.train.adapters.bottleneck:BottleneckAdapter",
        "tokens": "tunesmith.train.adapters.others:Tokens",
        "full": "tunesmith.train.adapters.full:Full",
        "partial": "tunesmith.train.adapters.full:Partial",
    },
    # What turns gradients into steps: `train.optimizer`. A Section with check(device), build(groups, rate).
    "optimizer": {
        "adamw": "tunesmith.train.optimizers.sections:AdamW",
        "adafactor": "tunesmith.train.optimizers.sections:Adafactor",
        "sgd": "tunesmith.train.optimizers.sections:Sgd",
        "lion": "tunesmith.train.optimizers.sections:Lion",
        "muon": "tunesmith.train.optimizers.sections:Muon",
        "schedule_free": "tunesmith.train.optimizers.sections:ScheduleFree",
        "adamw_8bit": "tunesmith.train.optimizers.sections:AdamW8bit",
        "paged_adamw": "tunesmith.train.optimizers.sections:PagedAdamW",
        "galore": "tunesmith.train.optimizers.sections:GaLore",
    },
    # What holds a model near its start: `train.keep`. A Section with begin(start) -> a term with add(step).
    "keep": {
        "l2": "tunesmith.train.keep.sections:L2",
        "ewc": "tunesmith.train.keep.sections:Ewc",
        "kl": "tunesmith.train.keep.sections:Kl",
    },
    # How several ranks train one model: `train.parallel`. A Section with over(ranks, step).
    "parallel": {
        "ddp": "tunesmith.train.parallel.kinds:Ddp",
        "fsdp": "tunesmith.train.parallel.kinds:Fsdp",
        "zero": "tunesmith.train.parallel.kinds:Zero",
    },
    # Another place for a run's figures: `train.trackers`. A Section with open(name, folder, settings).
    "tracker": {
        "tensorboard": "tunesmith.train.trackers.tensorboard:TensorBoard",
        "wandb": "tunesmith.train.trackers.wandb:Wandb",
        "mlflow": "tunesmith.train.trackers.mlflow:Mlflow",
        "clearml": "tunesmith.train.trackers.clearml:ClearMl",
        "dvclive": "tunesmith.train.trackers.dvclive:DvcLive",
    },
    # A file's format, by its suffix: (path) -> iterator of (row number, row or Broken).
    "reader": {
        "jsonl": "tunesmith.data.readers:read_jsonl",
        "ndjson": "tunesmith.data.readers:read_jsonl",
        "json": "tunesmith.data.readers:read_json",
        "csv": "tunesmith.data.readers:read_csv",
        "tsv": "tunesmith.data.readers:read_tsv",
        "parquet": "tunesmith.data.columnar:read_parquet",
        "arrow": "tunesmith.data.columnar:read_arrow",
        "feather": "tunesmith.data.columnar:read_arrow",
        "txt": "tunesmith.data.documents:read_lines",
        "paragraphs": "tunesmith.data.documents:read_paragraphs",
        "document": "tunesmith.data.documents:read_document",
        "md": "tunesmith.data.documents:read_document",
        "markdown": "tunesmith.data.documents:read_document",
        "html": "tunesmith.data.documents:read_html",
        "htm": "tunesmith.data.documents:read_html",
        "pdf": "tunesmith.data.documents:read_pdf",
        "docx": "tunesmith.data.documents:read_docx",
        "conll": "tunesmith.data.documents:read_conll",
        "label_studio": "tunesmith.data.labelstudio:read_label_studio",
    },
    # A row's layout: `data.sources[].layout`. A Layout with fits(row) and read(row, source, where).
    "layout": {
        "preference": "tunesmith.data.judged:PreferencePair",
        "rated": "tunesmith.data.judged:RatedAnswer",
        "chat": "tunesmith.data.layouts:Chat",
        "sharegpt": "tunesmith.data.layouts:ShareGpt",
        "instruction": "tunesmith.data.layouts:Instruction",
        "prompt": "tunesmith.data.layouts:Prompt",
        "question": "tunesmith.data.layouts:Question",
        "text": "tunesmith.data.layouts:PlainText",
        "columns": "tunesmith.data.columns:Columns",
    },
    # Who works on rows: `data.engine`. An Engine (tunesmith/data/engines/engine.py) with start(folder).
    "data_engine": {
        "local": "tunesmith.data.engines.local:Local",
        "ray": "tunesmith.data.engines.on_ray:Ray",
        "spark": "tunesmith.data.engines.on_spark:Spark",
    },
    # A cleaning step: a key of `data.clean`. A Step (tunesmith/data/clean/step.py) with apply(rows, around).
    "clean": {
        "unicode": "tunesmith.data.clean.unicode:Unicode",
        "markdown": "tunesmith.data.clean.markdown:Markdown",
        "turns": "tunesmith.data.clean.turns:Turns",
        "language": "tunesmith.data.clean.language:Language",
        "length": "tunesmith.data.clean.length:Length",
        "repetition": "tunesmith.data.clean.length:Repetition",
        "boilerplate": "tunesmith.data.clean.boilerplate:Boilerplate",
        "duplicates": "tunesmith.data.clean.duplicates:Duplicates",
        "conflicts": "tunesmith.data.clean.conflicts:Conflicts",
        "labels": "tunesmith.data.clean.conflicts:Labels",
        "toxicity": "tunesmith.data.clean.toxicity:Toxicity",
        "bias": "tunesmith.data.clean.bias:Bias",
        "personal": "tunesmith.data.clean.personal:Personal",
        "secrets": "tunesmith.data.clean.secrets:Secrets",
        "contamination": "tunesmith.data.clean.contamination:Contamination",
    },
    # More training rows: `data.augment`. A Making with make(rows, means, account).
    "augment": {
        "typos": "tunesmith.data.augment.plain:Typos",
        "case": "tunesmith.data.augment.plain:Case",
        "noise": "tunesmith.data.augment.plain:Noise",
        "paraphrase": "tunesmith.data.augment.asked:Paraphrase",
        "synthesise": "tunesmith.data.augment.asked:Synthesise",
    },
    # A score: `goal.metric`, `evaluate.metrics`. A Metric with stats(answers, references) and value(sums).
    "metric": {
        "exact_match": "tunesmith.evaluate.metrics.base:exact_match",
        "accuracy": "tunesmith.evaluate.metrics.base:accuracy",
        "macro_f1": "tunesmith.evaluate.metrics.labels:macro_f1",
        "macro_precision": "tunesmith.evaluate.metrics.labels:macro_precision",
        "macro_recall": "tunesmith.evaluate.metrics.labels:macro_recall",
        "micro_f1": "tunesmith.evaluate.metrics.labels:micro_f1",
        "micro_precision": "tunesmith.evaluate.metrics.labels:micro_precision",
        "micro_recall": "tunesmith.evaluate.metrics.labels:micro_recall",
        "weighted_f1": "tunesmith.evaluate.metrics.labels:weighted_f1",
        "multilabel_f1": "tunesmith.evaluate.metrics.labels:multilabel_f1",
        "multilabel_macro_f1": "tunesmith.evaluate.metrics.labels:multilabel_macro_f1",
        "multilabel_exact": "tunesmith.evaluate.metrics.labels:multilabel_exact",
        "json_valid": "tunesmith.evaluate.metrics.structured:json_valid",
        "json_field_f1": "tunesmith.evaluate.metrics.structured:json_field_f1",
        "schema_valid": "tunesmith.evaluate.metrics.structured:schema_valid",
        "tool_call": "tunesmith.evaluate.metrics.structured:tool_call",
        "tool_name": "tunesmith.evaluate.metrics.structured:tool_name",
        "span_f1": "tunesmith.evaluate.metrics.structured:span_f1",
        "numeric": "tunesmith.evaluate.metrics.structured:numeric",
        "rouge_1": "tunesmith.evaluate.metrics.text:rouge_1",
        "rouge_2": "tunesmith.evaluate.metrics.text:rouge_2",
        "rouge_l": "tunesmith.evaluate.metrics.text:rouge_l",
        "bleu": "tunesmith.evaluate.metrics.text:bleu",
        "chrf": "tunesmith.evaluate.metrics.text:chrf",
        "meteor": "tunesmith.evaluate.metrics.text:meteor",
        "wer": "tunesmith.evaluate.metrics.text:wer",
        "cer": "tunesmith.evaluate.metrics.text:cer",
        "bertscore": "tunesmith.evaluate.metrics.bertscore:bertscore",
        "sql": "tunesmith.evaluate.metrics.sql:sql",
        "pass_at_1": "tunesmith.evaluate.metrics.code:pass_at_1",
        "pass_at_5": "tunesmith.evaluate.metrics.code:pass_at_5",
        "pass_at_10": "tunesmith.evaluate.metrics.code:pass_at_10",
        "choice_accuracy": "tunesmith.evaluate.metrics.choice:choice_accuracy",
        "choice_accuracy_norm": "tunesmith.evaluate.metrics.choice:choice_accuracy_norm",
        "ece": "tunesmith.evaluate.metrics.choice:ece",
        "preference": "tunesmith.evaluate.metrics.likelihood:preference",
        "loss": "tunesmith.evaluate.metrics.likelihood:loss",
        "perplexity": "tunesmith.evaluate.metrics.likelihood:perplexity",
        "bits_per_token": "tunesmith.evaluate.metrics.likelihood:bits_per_token",
        "bits_per_byte": "tunesmith.evaluate.metrics.likelihood:bits_per_byte",
    },
    # What may go in and come out of a served model: an item of `serve.guards`. A Guard (serve/guards/guard.py).
    "guard": {
        "blocklist": "tunesmith.serve.guards.texts:Blocklist",
        "personal": "tunesmith.serve.guards.texts:PersonalData",
        "secrets": "tunesmith.serve.guards.texts:SecretKeys",
        "toxicity": "tunesmith.serve.guards.texts:Toxicity",
        "model": "tunesmith.serve.guards.model:GuardModel",
    },
    # What answers in evaluation and chat: `evaluate.engine`. Makes an Engine (tunesmith/inference/engine.py) of
    # (model, machine, adapter).
    "engine": {
        "transformers": "tunesmith.inference.transformers_engine:TransformersEngine",
        "auto": "tunesmith.inference.answering:Answering",
        "llamacpp": "tunesmith.inference.answering:LlamaCpp",
        "vllm": "tunesmith.inference.answering:Vllm",
    },
    # What answers many at once: an `engine` in serving. A Section with build(name, model) -> a ServingEngine
    # (tunesmith/inference/served.py).
    "serving": {
        "auto": "tunesmith.inference.engines:Auto",
        "llamacpp": "tunesmith.inference.engines:LlamaCpp",
        "transformers": "tunesmith.inference.engines:Transformers",
        "vllm": "tunesmith.inference.engines:Vllm",
    },
}


@cache
def known(point: str) -> dict[str, str]:
    """The names of an extension point and where each lies ("module:object")."""
    return BUILT_IN[point] | {e.name: e.value for e in entry_points(group=f"tunesmith.{point}")}


def load(point: str, name: str) -> Any:
    """The object behind a plugin's name.

    Raises:
        RecipeError: no plugin of this point has that name.
    """
    table = known(point)
    if name not in table:
        raise RecipeError(
            f"no {point} is called '{name}'{nearest(name, table)}", fix=f"Known: {', '.join(sorted(table))}."
        )
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)


def _section(point: str) -> Callable[[Any], Section]:
    def build(value: Any) -> Section:
        if isinstance(value, Section):
            return value
        settings = {"kind": value} if isinstance(value, str) else value
        if not isinstance(settings, dict) or not isinstance(settings.get("kind"), str):
            raise ValueError(f"expected the name of one ({', '.join(known(point))}), or a mapping with `kind`")
        try:
            section: type[Section] = load(point, settings["kind"])
        except RecipeError as error:
            raise ValueError(f"{error.what}; known: {', '.join(sorted(known(point)))}") from None
        return section.model_validate(settings)

    return build


def field(point: str) -> Any:
    """The pydantic type of a recipe key that picks a plugin by `kind` and passes it its own settings."""
    schema = {
        "oneOf": [
            {"type": "string", "enum": sorted(BUILT_IN[point])},
            {"type": "object", "properties": {"kind": {"type": "string"}}, "required": ["kind"]},
        ]
    }
    return Annotated[SerializeAsAny[Section], BeforeValidator(_section(point)), WithJsonSchema(schema)]


def table(point: str) -> Any:
    """The pydantic type of a recipe key that names plugins in order, each with its settings.

    `true` takes a plugin as it is, `false` leaves it out, and a plain value stands for the key that the plugin's
    class calls `short`.
    """
    settings = {"anyOf": [{"type": kind} for kind in ("boolean", "string", "number", "array", "object")]}
    schema = {"type": "object", "properties": dict.fromkeys(BUILT_IN[point], settings), "default": {}}

    def named(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        on = {name: given for name, given in value.items() if given is not False and given is not None}
        return {name: given if isinstance(given, Section) else (name, given) for name, given in on.items()}

    def build(value: Any) -> Section:
        if isinstance(value, Section):
            return value
        name, given = value
        try:
            section = load(point, str(name))
        except RecipeError as error:
            raise ValueError(f"{error.what}; known: {', '.join(sorted(known(point)))}") from None
        if given is True:
            given = {}
        elif not isinstance(given, dict):
            if section.short is None:
                raise ValueError(f"expected true, false or a mapping of {', '.join(section.model_fields) or 'nothing'}")
            given = {section.short: given}
        found: Section = section.model_validate(given)
        return found

    item = Annotated[SerializeAsAny[Section], BeforeValidator(build)]
    return Annotated[dict[str, item], BeforeValidator(named), WithJsonSchema(schema)]
