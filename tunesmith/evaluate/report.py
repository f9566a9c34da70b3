"""The report: what a run proved, in one HTML file that needs no network; its one script only searches the answers."""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tunesmith import charts
from tunesmith.charts import Series
from tunesmith.evaluate.conditions import scores_in
from tunesmith.evaluate.metrics.base import same
from tunesmith.evaluate.mistakes import gain
from tunesmith.runs import STAGES, Run, digest, read_json, read_jsonl, write_text
from tunesmith.scores import doubt, number, signed

SIDES = ("baseline", "tuned")
BEST, WORST, RANDOM = 7, 7, 6
SLICES, SHOWN_AT_MOST, EXAMPLES = 15, 20_000, 12
MEANS = {
    "exact_match": "share of answers equal to the reference",
    "accuracy": "share of answers equal to the reference",
    "macro_f1": "F1 of each class, averaged over the classes",
    "json_valid": "share of answers that are a JSON object",
    "json_field_f1": "F1 over the fields of the JSON objects",
    "rouge_l": "longest common subsequence with the reference, as F1",
    "chrf": "character n-grams shared with the reference, 0 to 100",
    "loss": "nats per token of the reference under the model",
    "perplexity": "e to the loss",
}
ANSWERS = {"json": "JSON objects", "label": "labels from a small set", "text": "free text"}
OF_TASK = "validation_loss_"
KEPT = {
    "keep_l2": "From the start: half the squared distance",
    "keep_ewc": "From the start, by Fisher information",
    "keep_kl": "KL to the start, nats per token",
}


def write_report(run: Run) -> None:
    """Write `run.report` from what the complete stages left. The evaluation must be among them."""
    card = read_json(run.scorecard)
    manifests = {stage: m for stage in STAGES if (m := run.complete(stage))}
    steps, lines = read_jsonl(run.metrics), read_jsonl(run.stage("evaluate") / "answers.jsonl")
    higher = card["metrics"][card["goal_metric"]]["higher_is_better"]
    page = (
        environment()
        .get_template("report.html.jinja")
        .render(
            name=run.name,
            card=card,
            verdict=verdict_in_words(card),
            metrics=[_metric(name, score) for name, score in card["metrics"].items()],
            sections=sections(card),
            slices=card.get("slices", [])[:SLICES],
            tasks=card.get("tasks"),
            classes=_classes(card),
            gate=card.get("gate"),
            rounds=card.get("rounds"),
            failures={side: n for side, n in card.get("failures", {}).items() if n},
            examples=_examples(run),
            every=every_answer(lines, higher),
            errors=card.get("errors"),
            by_id={line["id"]: line for line in lines},
            curves=loss_curves(steps),
            **_answers(lines, card, manifests),
            data=manifests.get("data"),
            answers_are=ANSWERS.get(card["answers"], card["answers"]),
            training=_training(manifests, steps),
            findings=read_jsonl(run.findings),
            samples=_samples(read_jsonl(run.samples)),
            package=manifests.get("package"),
            recipe=run.recipe.read_text(encoding="utf-8"),
            model=_model(manifests),
            manifests=manifests,
            lineage=[_lineage(stage, manifests) for stage in manifests],
        )
    )
    write_text(run.report, page)


def environment() -> Environment:
    found = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {
        "number": number,
        "signed": signed,
        "doubt": doubt,
        "p": p_value,
        "grouped": grouped,
        "duration": duration,
    }
    return found


def p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.0005 else "<0.001"


def grouped(count: int | None) -> str:
    return "–" if count is None else f"{count:,}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def verdict_in_words(card: dict[str, Any]) -> dict[str, str]:
    """The verdict's class, its headline, and what it rests on."""
    score = card["metrics"][card["goal_metric"]]
    gap, higher = score["difference"], score["higher_is_better"]
    side = "above" if (card["verdict"] == "better") == higher else "below"
    wholly = f"The whole interval is {side} zero ({'higher' if higher else 'lower'} is better)."
    headline, why = {
        "better": ("The tuned model is better.", wholly),
        "worse": ("The tuned model is worse.", wholly + " Keep the base model."),
        "not_proven": (
            "Not proven.",
            f"Too few rows bear on the difference for its interval to be proof; it takes {gap['needs']:,}."
            if "needs" in gap
            else "The interval holds zero: these rows can’t tell the two models apart. More test rows narrow it.",
        ),
    }[card["verdict"]]
    return {"style": card["verdict"], "headline": headline, "why": why, "difference": signed(gap["value"])}


def _metric(name: str, score: dict[str, Any]) -> dict[str, Any]:
    rows = [(side, side, *(score[side][k] for k in ("value", "low", "high"))) for side in SIDES]
    return {
        "name": name,
        "means": MEANS.get(name, ""),
        "score": score,
        "chart": Markup(charts.intervals(f"{name}: baseline and tuned with 95% intervals", rows)),
    }


def sections(card: dict[str, Any]) -> list[dict[str, Any]]:
    """Every other score of the card by section: rows of (name, baseline, tuned, difference, n)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path, score in scores_in(card):
        if len(path) > 1:
            row = {"name": " ".join(path[1:]).replace("_", " "), "score": score, "paired": "tuned" in score}
            found.setdefault(path[0], []).append(row)
    return [
        {"name": name, "rows": rows, "about": ABOUT.get(name, "") + notes(name, card)} for name, rows in found.items()
    ]


def notes(section: str, card: dict[str, Any]) -> str:
    """What a section of the card holds besides scores, in words."""
    told = card[section]
    if section == "review":
        return (
            f" {told['judgements']} judgements by {len(told['reviewers'])}; {told['same_answers']} pairs are the same."
        )
    if section != "judge":
        return ""
    usage, failed = told["usage"], sum(told["failures"].values())
    cost = f", a cost of {usage['cost']:.4g}" if usage["cost"] else ""
    spent = f"{usage['prompt_tokens']:,} tokens read and {usage['completion_tokens']:,} written{cost}"
    why = f" {failed} can't be used and count as no difference: {'; '.join(told['failures'])}." if failed else ""
    return f" {told['model']} gave {usage['calls']:,} judgements, {spent}.{why}"


ABOUT = {
    "constant": "The tuned model against giving the commonest label always (in the baseline's place here).",
    "latency": "Rows asked one at a time, in seconds; how many answers differ from those given in batches.",
    "forgetting": "The base’s behaviour on general prompts: divergence in nats a token (kl), perplexity of its "
    "answers, share of answers that changed, and what the old and new ones share (ROUGE-L).",
    "memory": "Loss on unseen rows less that on seen ones (gap), training rows continued word for word (verbatim), "
    "and how many of 8 bits of planted secrets are given away (exposure).",
    "safety": "Shares of unsafe and of harmless prompts that are refused, of attacks withstood, of answers that leak.",
    "bias": "Scores of bias before and after.",
    "suites": "Public tasks.",
    "review": "What people preferred who did not know whose answer was whose: the tuned answer's share of wins, ties "
    "as half (preference); its log-strength against the baseline (Bradley-Terry); how far reviewers agree (1: wholly, "
    "0: as by chance).",
    "judge": "What a model that judges preferred: the tuned answer's share of wins, ties as half (preference); an "
    "answer wins only if it does in both orders. Scores by the criteria (score), sentences that the prompt supports "
    "(supported), and how far the judge agrees with people (agreement).",
}


def _classes(card: dict[str, Any]) -> dict[str, Any] | None:
    """By class: both models' scores, worst first, where a metric tells them."""
    details = card["metrics"].get("macro_f1", {}).get("details")
    if not details:
        return None
    both = [(label, details["baseline"]["classes"][label], told) for label, told in details["tuned"]["classes"].items()]
    return {"rows": sorted(both, key=lambda row: row[2]["f1"]), "confusion": details["tuned"].get("confusion")}


def _examples(run: Run) -> list[dict[str, Any]]:
    """Answers to general, unsafe and judged prompts that tuning changed."""
    found = []
    for name in ("forgetting", "safety", "judge"):
        lines = read_jsonl(run.stage("evaluate") / f"{name}.jsonl")
        changed = [line for line in lines if line["baseline"] != line["tuned"]]
        found += [line | {"section": name} for line in changed[:: max(1, len(changed) // EXAMPLES)][:EXAMPLES]]
    return found


def every_answer(rows: list[dict[str, Any]], higher: bool) -> list[dict[str, Any]]:
    """All answers, those where the tuned model is worse first; the page's search looks through them."""
    shown = sorted(rows, key=lambda row: gain(row, higher))[:SHOWN_AT_MOST]
    return [
        {"id": r["id"], "asked": r["prompt"][-1]["content"] if r["prompt"] else "", "reference": r["reference"]}
        | {side: r[side]["answer"] for side in SIDES}
        for r in shown
    ]


def loss_curves(steps: Sequence[dict[str, Any]]) -> list[Markup]:
    """Loss, learning rate and gradient norm over the steps; none where nothing was recorded."""

    def points(key: str) -> list[tuple[float, float]]:
        return [(row["step"], row[key]) for row in steps if isinstance(row.get(key), int | float)]

    loss = [
        Series("training, each step", "raw", points("loss")),
        Series("training, smoothed", "tuned", charts.smooth(points("loss"))),
        Series("validation", "baseline", points("validation_loss"), dots=True),
    ]
    small = [("Learning rate", "learning_rate"), ("Gradient norm, before clipping", "grad_norm")]
    small += [(title, key) for key, title in KEPT.items()]
    tags = dict.fromkeys(key[len(OF_TASK) :] for row in steps for key in row if key.startswith(OF_TASK))
    small += [(f"Validation loss, {tag}", OF_TASK + tag) for tag in tags]
    drawn = [charts.curves("Loss, nats per token", loss)]
    drawn += [
        charts.curves(title, [Series(title, "tuned", points(key))], (320, 148), "small", 4) for title, key in small
    ]
    return [Markup(svg) for svg in drawn if svg]


def _answers(rows: list[dict[str, Any]], card: dict[str, Any], manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    higher = card["metrics"][card["goal_metric"]]["higher_is_better"]
    seen = [_answer(row) for row in rows]
    judged = all(row["scores"][side] in (0.0, 1.0) for row in seen for side in SIDES)
    tally = Counter(tuple(row["scores"][side] == 1.0 for side in SIDES) for row in seen) if judged else None
    first = {row["prompt"][0]["content"] if row["prompt"] else None for row in rows}
    opens = all(row["prompt"] and row["prompt"][0]["role"] == "system" for row in rows)
    shared = first.pop() if len(first) == 1 and opens else None
    if shared is not None:
        for row in seen:
            row["prompt"] = row["prompt"][1:]
    groups = pick(seen, higher, manifests["evaluate"]["seed"] if "evaluate" in manifests else 0)
    return {"groups": groups, "judged": judged, "tally": tally, "system": shared}


def _answer(row: dict[str, Any]) -> dict[str, Any]:
    """A row of answers.jsonl; where the goal gives single rows no score, equality with the reference does."""
    scores = {
        side: float(same(row[side]["answer"], row["reference"]))
        if row[side]["score"] is None or not math.isfinite(row[side]["score"])
        else row[side]["score"]
        for side in SIDES
    }
    gained = (row["baseline"]["nll"] or 0.0) - (row["tuned"]["nll"] or 0.0)
    return row | {"scores": scores, "likelier": gained / max(row["tuned"]["tokens"], 1)}


def pick(rows: list[dict[str, Any]], higher: bool, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows that gained most, lost most, and others at random; no row twice.

    Rows that gained the same are told apart by the tuned model's own score, then by how much likelier the
    reference became.
    """
    sign = 1 if higher else -1

    def merit(i: int) -> tuple[float, float, float]:
        score = rows[i]["scores"]
        return sign * (score["tuned"] - score["baseline"]), sign * score["tuned"], rows[i]["likelier"]

    order = sorted(range(len(rows)), key=merit, reverse=True)
    best = order[: min(BEST, (len(order) + 1) // 2)]
    worst = order[len(best) :][::-1][:WORST]
    rest = sorted(set(order) - {*best, *worst})
    drawn = random.Random(seed).sample(rest, min(RANDOM, len(rest)))
    return {
        "best": [rows[i] for i in best],
        "worst": [rows[i] for i in worst],
        "random": [rows[i] for i in drawn],
    }


def _training(manifests: dict[str, dict[str, Any]], steps: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    if "train" not in manifests:
        return None
    speeds = [row["tokens_per_second"] for row in steps if row.get("tokens_per_second")]
    kept = manifests["train"]["summary"].get("keep") or {}
    return (
        {"auto": {}}
        | manifests["train"]["summary"]
        | {
            "kept": ", ".join(f"{name} {number(value)}" for name, value in kept.items()) or "no term",
            "speed": statistics.median(speeds) if speeds else None,
            "memory": max((row.get("memory_bytes", 0) for row in steps), default=0),
        }
    )


def _samples(lines: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Each sampled row's answers, from validation to validation; an answer that did not change is told once."""
    by_row: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        told = by_row.setdefault(line["row"], [])
        if not told or told[-1]["answer"] != line["answer"]:
            told.append(line)
    return list(by_row.values())


def _model(manifests: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    return next((m["model"] for m in manifests.values() if "model" in m), None)


def _lineage(stage: str, manifests: dict[str, dict[str, Any]]) -> dict[str, Any]:
    manifest = manifests[stage]
    return {
        "stage": stage,
        "key": manifest["key"],
        "digest": digest(manifest),
        "parents": manifest["parents"],
        "inputs": manifest["inputs"],
        "started": manifest["started"],
        "seconds": manifest["seconds"],
    }
