"""A job as a recipe. Nothing in it that a client wrote can name a file, an address or code of this machine."""

from __future__ import annotations

import copy
import re
from typing import Any

from tunesmith import plugins
from tunesmith.errors import RecipeError
from tunesmith.recipe import Recipe, build
from tunesmith.runs import STAGES

KEPT = 3  # checkpoints of a job that answer as models
METHODS = {"supervised": "sft", "dpo": "dpo"}
TRAINABLE = ("sft", "text", "dpo", "cpo", "simpo", "orpo", "kto")  # what they make can be served
# Adapters whose result is merged into a model, which answers on an engine of its own; plain LoRA loads on its base.
WHOLE = ("adalora", "loha", "lokr", "vera", "oft", "boft", "ia3", "full", "partial")
PLACED = ("start_from", "trackers", "parallel", "snapshots", "keep")  # keys that name places, or are the service's own
DATA = ("system", "over_length", "max_rejected", "split", "balance", "clean", "canaries", "answers")
CLEAN = (
    "unicode",
    "turns",
    "length",
    "repetition",
    "duplicates",
    "conflicts",
    "labels",
    "language",
    "personal",
    "secrets",
)
EVALUATE = ("metrics", "rows", "max_new_tokens")
# Metrics that neither run a row's text nor open or fetch what a row or the name says.
METRICS = (
    *("exact_match", "accuracy", "macro_f1", "macro_precision", "macro_recall", "micro_f1", "micro_precision"),
    *("micro_recall", "weighted_f1", "multilabel_f1", "multilabel_macro_f1", "multilabel_exact", "json_valid"),
    *("json_field_f1", "tool_call", "tool_name", "span_f1", "numeric", "rouge_1", "rouge_2", "rouge_l", "bleu"),
    *("chrf", "meteor", "wer", "cer", "choice_accuracy", "choice_accuracy_norm", "ece", "preference", "loss"),
    *("perplexity", "bits_per_token", "bits_per_byte"),
)
NAMES = ("auto", "none")  # models of people's names; others are folders and hub ids


def refuse(settings: dict[str, Any]) -> None:
    """Raise where a client's settings name what is not theirs to name.

    Raises:
        RecipeError: `where` is the key.
    """
    train, data, evaluate, goal = (_mapping(settings, part) for part in ("train", "data", "evaluate", "goal"))
    _only(evaluate, EVALUATE, "evaluate")
    _only(data, DATA, "data")
    clean, split = _mapping(data, "clean", "data."), _mapping(data, "split", "data.")
    _only(clean, CLEAN, "data.clean")
    for step, key, known in (("personal", "names", NAMES), ("duplicates", "model", ())):
        chosen = clean.get(step)
        if isinstance(chosen, dict) and key in chosen and chosen[key] not in known:
            raise RecipeError(
                "names a model of the server",
                where=f"data.clean.{step}.{key}",
                fix=f"Take one of: {', '.join(known)}." if known else "Leave it out.",
            )
    for key in PLACED:
        if key in train:
            raise RecipeError("can't be set in a job of the service", where=f"train.{key}", fix="Leave it out.")
    method = train.get("method")
    kind = method.get("kind") if isinstance(method, dict) else method
    if kind is not None and kind not in TRAINABLE:
        raise RecipeError(
            f"'{kind}' does not make a model that can be served",
            where="train.method",
            fix=f"Take one of: {', '.join(TRAINABLE)}.",
        )
    other = adapter(settings).get("kind")
    if isinstance(other, str) and other in plugins.known("adapter").keys() - {"lora", *WHOLE}:
        raise RecipeError(
            f"'{other}' makes what can't be served: it is neither a LoRA on its base nor merged into it",
            where="train.adapter",
            fix=f"Take one of: lora, {', '.join(WHOLE)}; tunesmith run trains the others.",
        )
    for part in ("validation", "test"):
        if isinstance(split.get(part), str):
            raise RecipeError(
                "is a share or a number of rows here",
                where=f"data.split.{part}",
                fix="A file goes into validation_file.",
            )
    asked = evaluate.get("metrics") or []
    if not isinstance(asked, list):
        raise RecipeError("is not a list of metrics", where="evaluate.metrics", fix="Give [exact_match, ...].")
    _metrics(asked, "evaluate.metrics", METRICS)
    _metrics([goal["metric"]] if goal.get("metric") is not None else [], "goal.metric", METRICS)
    by = train.get("best_by")  # what is no metric may be a figure of the validation; the recipe knows which there are
    _metrics([by] if isinstance(by, str) and by in plugins.known("metric") else [], "train.best_by", METRICS)
    _metrics(_gated(settings.get("gate")), "gate", METRICS)


def whole(settings: dict[str, Any]) -> bool:
    """Whether these settings make a model of its own, rather than a plain LoRA."""
    chosen = adapter(settings)
    targets = chosen.get("targets")
    experts = "experts" in (targets if isinstance(targets, list) else [targets])
    return chosen.get("kind") != "lora" or bool(chosen.get("dora")) or experts


def adapter(settings: dict[str, Any]) -> dict[str, Any]:
    """What these settings say of `train.adapter`."""
    chosen = (settings.get("train") or {}).get("adapter", "lora")
    return chosen if isinstance(chosen, dict) else {"kind": chosen if isinstance(chosen, str) else None}


def _mapping(given: dict[str, Any], key: str, above: str = "") -> dict[str, Any]:
    """A part of the settings, empty if it is not given."""
    found = given.get(key)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise RecipeError("is not a mapping of settings", where=f"{above}{key}", fix="Give {key: value, ...}.")
    return found


def _metrics(asked: list[Any], where: str, known: tuple[str, ...]) -> None:
    if any(name not in known for name in asked):
        raise RecipeError(
            "names what is no metric of the service",
            where=where,
            fix=f"Take one of: {', '.join(known)}.",
        )


def _gated(gate: Any) -> list[str]:
    """The metrics that a gate's conditions name, which evaluation then measures."""
    conditions = gate.get("conditions") if isinstance(gate, dict) else gate
    texts = [text for text in conditions if isinstance(text, str)] if isinstance(conditions, list) else []
    roots = [re.split(r"[\s.<>]", text.strip(), maxsplit=1)[0] for text in texts]
    return [root for root in roots if root in plugins.known("metric")]


def _only(given: Any, known: tuple[str, ...], where: str) -> None:
    other = next((key for key in given if key not in known), None) if isinstance(given, dict) else None
    if other is not None:
        raise RecipeError(
            "can't be set in a job of the service", where=f"{where}.{other}", fix=f"There are: {', '.join(known)}."
        )


def recipe_of(
    name: str,
    model: str,
    seed: int,
    method: dict[str, Any],
    settings: dict[str, Any],
    files: tuple[str, str | None],
    start: str | None = None,
    integrations: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """A recipe's keys.

    Args:
        model: what a recipe's `model` takes.
        method: the job's, as `{"type": "dpo", "dpo": {"hyperparameters": {...}}}`.
        files: the training file's path and the validation file's.
        start: the folder of an adapter that training goes on from.
    """
    kind = method["type"]
    hyper = method[kind]["hyperparameters"]
    loss: dict[str, Any] = {"kind": METHODS[kind]}
    if kind == "supervised":
        loss["accuracy"] = True
    elif hyper.get("beta", "auto") != "auto":
        loss["beta"] = hyper["beta"]
    train = {
        "method": loss,
        "epochs": hyper["n_epochs"],
        "batch_size": hyper["batch_size"],
        "learning_rate": "auto",
        "max_length": "auto",
        **copy.deepcopy(settings.get("train", {})),
        "snapshots": 0 if whole(settings) else KEPT,
        "trackers": [{"kind": i["type"], **{k: v for k, v in i[i["type"]].items() if v}} for i in integrations or []],
        **({"start_from": start} if start else {}),
    }
    if train["method"] == "sft":
        train["method"] = loss
    proves = any(part in settings for part in ("evaluate", "goal", "gate"))
    data = copy.deepcopy(settings.get("data", {}))
    split = {"validation": 0, "test": 0.1 if proves else 0} | (data.get("split") or {})
    if files[1] is not None:
        split["validation"] = files[1]
    return {
        "name": name,
        "seed": seed,
        "model": model,
        "data": data | {"sources": [{"path": files[0], "format": "jsonl"}], "split": split},
        "train": train,
        **{part: copy.deepcopy(settings[part]) for part in ("evaluate", "goal", "gate") if part in settings},
    }


def stages(recipe: dict[str, Any]) -> tuple[str, ...]:
    """How far the job walks: it also proves what it made where that was asked for, and merges what is no plain LoRA."""
    wanted = STAGES[: 3 if any(part in recipe for part in ("evaluate", "goal", "gate")) else 2]
    return (*wanted, "package") if whole(recipe) else wanted


def checked(keys: dict[str, Any]) -> Recipe:
    """The recipe, validated.

    Raises:
        RecipeError: a setting can't be meant.
    """
    return build(copy.deepcopy(keys), where="settings")
