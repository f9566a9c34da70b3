"""The model card: README.md of the merged model, with the front matter that the Hugging Face hub reads."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tunesmith.runs import Run, digest, versions
from tunesmith.scores import doubt, number, signed, spanned, within

# The hub's own names, where it has one for a metric of ours.
HUB_METRICS = {"macro_f1": "f1", "rouge_l": "rouge"}
ANSWERS = {"json": "JSON objects", "label": "labels from a small set", "text": "free text"}
STAGES_BEFORE = ("data", "train", "evaluate")


HOW = {
    "full": "all of its weights trained",
    "partial": "some of its weights trained",
    "lora": "with a LoRA adapter that is merged into its weights",
}


def card(run: Run, model: dict[str, Any], beside: str | None = None, gguf: Sequence[str] = ()) -> str:
    """The card of a run's merged model, in Markdown.

    Args:
        model: the base, as `ResolvedModel.as_dict` tells of it.
        gguf: names of GGUF files that lie beside it.
        beside: code that puts the folder's adapter on the loaded `model`, where it could not be merged.
    """
    manifests = {stage: m for stage in STAGES_BEFORE if (m := run.complete(stage))}
    recipe = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
    scores = run.scores
    front = yaml.safe_dump(front_matter(run, recipe, model, scores), sort_keys=False, allow_unicode=True)
    parts = (
        _opening(run, recipe, model, manifests, scores, beside),
        _scores(scores),
        *_gate(scores),
        *_besides(scores),
        _use(recipe, model, scores, beside) + _gguf(gguf),
        _data(manifests),
        _training(recipe, manifests),
        _limits(model, scores),
        _lineage(model, manifests),
    )
    return f"---\n{front}---\n\n" + "\n\n".join(parts) + "\n"


def front_matter(
    run: Run, recipe: dict[str, Any], model: dict[str, Any], scores: dict[str, Any] | None
) -> dict[str, Any]:
    """The hub's metadata. Only finite results go in: the hub takes no others."""
    found: dict[str, Any] = {
        "base_model": _base_name(model),
        "base_model_relation": "finetune",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["tunesmith", recipe["train"]["adapter"]["kind"]],
    }
    if model.get("licence"):
        found["license"] = model["licence"]
    metrics = [
        {"type": HUB_METRICS.get(name, name), "name": name, "value": score["tuned"]["value"]}
        for name, score in (scores["metrics"] if scores else {}).items()
        if math.isfinite(score["tuned"]["value"])
    ]
    if metrics:
        dataset = {"name": f"{run.name}: held-out test rows", "type": run.name, "split": "test"}
        task = {"type": "text-generation", "name": "Text generation"}
        result = {"task": task, "dataset": dataset, "metrics": metrics}
        found["model-index"] = [{"name": run.name, "results": [result]}]
    return found


def _base_name(model: dict[str, Any]) -> str:
    """The base's hub id or name; of a folder or file its last part: no path of this disk is published."""
    name: str = model["hub_id"] or model["name"]
    return Path(name).name if model.get("source") in ("folder", "gguf") else name


def _opening(
    run: Run,
    recipe: dict[str, Any],
    model: dict[str, Any],
    manifests: dict[str, dict[str, Any]],
    scores: dict[str, Any] | None,
    beside: str | None,
) -> str:
    kind = (manifests.get("data") or {}).get("answers", {}).get("kind")
    how = HOW.get(recipe["train"]["adapter"]["kind"], "with an adapter that is merged into its weights")
    how = "with an adapter that lies beside it" if beside else how
    answers = f" Its answers are {ANSWERS.get(kind, kind)}." if kind else ""
    goal = f" The goal was a better `{scores['goal_metric']}` on held-out rows of that data." if scores else ""
    return (
        f"# {run.name}\n\n"
        f"`{_base_name(model)}`, fine-tuned on a team's own data, {how}.{answers}{goal}\n\n"
        f"**Verdict.** {verdict_in_words(scores)}"
    )


def verdict_in_words(scores: dict[str, Any] | None) -> str:
    """What the scores prove about the goal, and what they don't."""
    if scores is None:
        return "Not evaluated: nothing is known yet about whether this model is better than its base."
    goal = scores["goal_metric"]
    score = scores["metrics"][goal]
    gap, better = score["difference"], "higher" if score["higher_is_better"] else "lower"
    facts = (
        f"`{goal}` went from {number(score['baseline']['value'])} to {number(score['tuned']['value'])} "
        f"on {scores['n']} held-out rows ({better} is better): a difference of {signed(gap['value'])}, "
        f"95% interval {signed(gap['low'])} to {signed(gap['high'])}{doubt(gap)}."
    )
    said = {
        "better": "Better than its base. " + facts,
        "worse": "Worse than its base. " + facts + " Use the base model instead.",
        "not_proven": "**Not proven** to be better than its base. "
        + facts
        + (" Too few rows bear on it" if "needs" in gap else " The interval holds zero")
        + ", so these rows can't tell the two models apart.",
    }
    return said[scores["verdict"]]


def _scores(scores: dict[str, Any] | None) -> str:
    if scores is None:
        return "## Scores\n\nNone yet: the run was packaged before it was evaluated."
    lines = [
        "| metric | better | baseline | tuned | difference | 95% interval | p | n |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, score in scores["metrics"].items():
        gap = score["difference"]
        cells = (
            f"**{name}** (goal)" if name == scores["goal_metric"] else name,
            "higher" if score["higher_is_better"] else "lower",
            number(score["baseline"]["value"]),
            number(score["tuned"]["value"]),
            signed(gap["value"]),
            f"{signed(gap['low'])} to {signed(gap['high'])}{doubt(gap)}",
            f"{gap['p']:.3f}" if gap["p"] >= 0.0005 else "<0.001",
            str(score["n"]),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return (
        "## Scores\n\n" + "\n".join(lines) + "\n\n"
        "Base and tuned model answered the same rows, which were kept out of training, with greedy decoding. "
        "Intervals and p values of the differences are paired over the rows."
    )


def _gate(scores: dict[str, Any] | None) -> list[str]:
    """What had to be proved before this model was handed on."""
    gate = (scores or {}).get("gate")
    if not gate:
        return []
    said = {"ship": "ship: all conditions are met", "hold": "hold: a condition is broken", "not_proven": "not proven"}
    decision = said[gate["decision"]]
    opening = f"The recipe's gate says **{decision}**." if gate["enforced"] else f"By the default gate: **{decision}**."
    if gate["enforced"] and gate["decision"] == "hold":
        opening += " It was packaged all the same, by force."
    lines = ["| condition | state | measured |", "| --- | --- | --- |"]
    lines += [
        f"| `{c['condition']}` | {c['state'].replace('_', ' ')} | {_cell(c['why'])} |" for c in gate["conditions"]
    ]
    return ["## Gate\n\n" + opening + "\n\n" + "\n".join(lines)]


BESIDES = {
    "forgetting": "Behaviour on general prompts, against the base: divergence in nats a token (kl), share of answers "
    "that changed, perplexity of the base's answers.",
    "memory": "Loss on unseen rows less that on seen ones (gap), training rows recited word for word (verbatim), "
    "planted secrets given away (exposure, bits).",
    "safety": "Shares of unsafe prompts refused (refusal), of harmless ones (over refusal), of attacks withstood "
    "(defence), and of answers that are toxic or hold personal data.",
    "bias": "Scores of bias; answers that change with a gender or a name (changed by swap).",
    "suites": "Public tasks.",
    "judge": "What a model that judges preferred.",
    "review": "What people preferred.",
}


def _besides(scores: dict[str, Any] | None) -> list[str]:
    """What was measured besides the task, a section each."""
    found = []
    for section, about in BESIDES.items():
        rows = list(within((scores or {}).get(section)))
        if not rows:
            continue
        lines = ["| score | baseline | tuned | difference | n |", "| --- | ---: | ---: | ---: | ---: |"]
        for path, score in rows:
            if "tuned" in score:
                sides = [spanned(score[side]) for side in ("baseline", "tuned")]
                cells = [*sides, signed(score["difference"]["value"])]
            else:
                cells = ["", spanned(score), ""]
            lines.append(f"| {' '.join(path).replace('_', ' ')} | {' | '.join(cells)} | {score.get('n', '')} |")
        found.append(f"## {section.capitalize()}\n\n{about}\n\n" + "\n".join(lines))
    return found


def _use(recipe: dict[str, Any], model: dict[str, Any], scores: dict[str, Any] | None, beside: str | None) -> str:
    trusted = ", trust_remote_code=True" if model.get("trust_remote_code") else ""
    system = recipe["data"].get("system")
    turns = [{"role": "system", "content": system}] if system else []
    turns.append({"role": "user", "content": "Write your message here."})
    messages = "".join(f"    {turn!r},\n" for turn in turns)
    code = (
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'name = "."  # this folder, or where it was uploaded to\n'
        f"tokenizer = AutoTokenizer.from_pretrained(name{trusted})\n"
        f"model = AutoModelForCausalLM.from_pretrained(name{trusted})\n"
        f"{beside or ''}\n"
        f"messages = [\n{messages}]\n"
        "inputs = tokenizer.apply_chat_template(\n"
        '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True\n'
        ")\n"
        f"output = model.generate(**inputs, max_new_tokens={(scores or {}).get('max_new_tokens', 256)}, "
        "do_sample=False)\n"
        'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))'
    )
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    told = " It was trained under this system message; without it, expect worse answers." if system else ""
    needs = "The folder holds the base as it was, and in `adapter` what was trained, which can't be merged into it."
    if not beside:
        needs = "With plain transformers; no Tunesmith is needed."
    return f"## How to use it\n\n{needs}{told}\n\n{fence}python\n{code}\n{fence}"


def _gguf(files: Sequence[str]) -> str:
    told = ", ".join(f"`{name}`" for name in files)
    return f"\n\nFor llama.cpp, Ollama and LM Studio: {told}, in the folder `gguf` beside this one." if files else ""


def _data(manifests: dict[str, dict[str, Any]]) -> str:
    if "data" not in manifests:
        return "## Data\n\nNot recorded."
    counts = manifests["data"]["counts"]
    removed = "".join(f", {n} removed ({step})" for step, n in counts["removed"].items())
    made = "".join(f", {n} made ({step})" for step, n in counts.get("made", {}).items())
    return (
        "## Data\n\n"
        f"{counts['read']} rows read, {counts['accepted']} accepted, "
        f"{counts['rejected']} rejected{removed}{made}.\n\n"
        "| training | validation | test |\n| ---: | ---: | ---: |\n"
        f"| {counts['train']} | {counts['validation']} | {counts['test']} |\n\n"
        "The rows themselves are not part of this folder."
    )


def _training(recipe: dict[str, Any], manifests: dict[str, dict[str, Any]]) -> str:
    summary = (manifests.get("train") or {}).get("summary", {})
    chosen = {key: choice["value"] for key, choice in summary.get("auto", {}).items()}
    section = recipe["train"] | {key: value for key, value in chosen.items() if "." not in key}
    if "adapter.rank" in chosen:
        section["adapter"] = section["adapter"] | {"rank": chosen["adapter.rank"]}
    parameters = summary.get("parameters", {})
    facts = {
        "method": _plugin(section["method"]),
        "adapter": _plugin(section["adapter"]),
        "learning rate": f"{section['learning_rate']:g}, {section['schedule']}",
        "share of the steps that warm up": section["warmup"],
        "rows in a step": section["batch_size"],
        "epochs asked for": section["epochs"],
        "most steps allowed": section.get("max_steps"),
        "steps taken": summary.get("steps"),
        "tokens seen": _grouped(summary.get("tokens")),
        "best step (kept)": summary.get("best_step"),
        "best validation loss": summary.get("best_validation_loss"),
        "longest row, tokens": section["max_length"],
        "precision of the base": summary.get("precision"),
        "parameters": _grouped(parameters.get("total")),
        "of them trained": _grouped(parameters.get("trained")),
        "seed": recipe["seed"],
    }
    lines = [f"| {what} | {_cell(value)} |" for what, value in facts.items() if value is not None]
    return "## Training\n\n| | |\n| --- | --- |\n" + "\n".join(lines)


def _plugin(section: dict[str, Any]) -> str:
    others = ", ".join(f"{key} {value}" for key, value in section.items() if key != "kind")
    return f"{section['kind']} ({others})" if others else str(section["kind"])


def _grouped(count: int | None) -> str | None:
    return None if count is None else f"{count:,}"


def _cell(value: Any) -> str:
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", r"\|").replace("\n", " ")


def _limits(model: dict[str, Any], scores: dict[str, Any] | None) -> str:
    measured = scores or {}
    limits = [
        "Safety and bias were measured on small sets of prompts: they show changes, not that the model is safe."
        if {"safety", "bias"} <= set(measured)
        else "Bias was not measured, and safety on a small set of prompts only."
        if "safety" in measured
        else "No safety evaluation was made: nothing was measured about harmful, biased or private content.",
        "It was made for one task. What it lost besides was measured on about 200 general prompts only."
        if "forgetting" in measured
        else "It was made for one task. What the base could do besides may have suffered; that was not measured.",
        "The base's limits and licence hold for this model too."
        if model.get("licence")
        else "The base's licence is not known to this run: look it up before you use or share this model.",
    ]
    if scores is None:
        limits.insert(0, "It was not evaluated: no score supports its use.")
    else:
        limits.insert(0, f"The scores rest on {scores['n']} rows of one data set; elsewhere they may not hold.")
        if scores["verdict"] == "not_proven":
            limits.insert(0, f"An improvement in `{scores['goal_metric']}` over the base is not proven.")
    if model.get("trust_remote_code"):
        limits.append("`trust_remote_code` is true: the base brings its own Python code, which runs when it is loaded.")
    return "## Limits\n\n" + "\n".join(f"- {limit}" for limit in limits)


def _lineage(model: dict[str, Any], manifests: dict[str, dict[str, Any]]) -> str:
    lines = ["| stage | key | content |", "| --- | --- | --- |"]
    lines += [f"| {stage} | `{m['key']}` | `{digest(m)}` |" for stage, m in manifests.items()]
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        "## Lineage\n\n"
        f"Base: `{_base_name(model)}`, from: {model['source']}, identity `{model['identity']}`, "
        f"`trust_remote_code`: {str(bool(model.get('trust_remote_code'))).lower()}.\n\n"
        + "\n".join(lines)
        + "\n\nA stage's key hashes all that its result depends on; content hashes its files.\n\n"
        f"Made with {used}."
    )
