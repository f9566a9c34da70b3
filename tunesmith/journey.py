"""One walk from recipe to package: the stages, what each is handed of the others, and their keys."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import runs
from tunesmith.errors import DataError, Held, RecipeError, RunError
from tunesmith.kit import Kit
from tunesmith.progress import say
from tunesmith.train.ranks import Ranks

if TYPE_CHECKING:
    from tunesmith.inference.engine import Engine


@dataclass
class Journey(Kit):
    """One walk with a kit: each stage brought up to date, and handed what the others made."""

    validated: Callable[[int, float], None] | None = None
    ranks: Ranks = dataclasses.field(default_factory=Ranks)

    @cached_property
    def device(self) -> str:
        """This rank's device, once it has met the others."""
        machine = self.machine
        return self.ranks.join(machine.device, machine.cores)

    def dismiss(self) -> None:
        """Let the other ranks go; what comes after training is the first one's."""
        if self.ranks.world > 1 and self.device:
            self.ranks.call("")
            self.ranks.leave(self.machine.cores)

    def key(self, stage: str) -> str:
        """A hash of all that the stage's result depends on.

        Raises:
            RunError: a stage that it needs is missing, or was made from something else.
        """
        digests = {}
        for name in NEEDS[stage]:
            manifest = self.run.complete(name, self.key(name))
            if manifest is not None:
                digests[name] = runs.digest(manifest)
            elif (stage, name) not in OPTIONAL:
                raise RunError(
                    f"stage '{stage}' needs '{name}', which is missing or out of date",
                    where=str(self.run.path),
                    fix="Run the whole recipe: tunesmith run.",
                )
        return runs.hash_json({"stage": stage, "facts": self.facts(stage), "parents": digests})

    def walk(self, stage: str) -> None:
        """Bring one stage up to date."""
        key = self.key(stage)
        if self.run.complete(stage, key):
            say(f"{stage}: up to date")
            return
        started = time.time()
        self.run.event("stage_started", stage=stage, key=key)
        with self.artifact(stage, key) as target:
            told = getattr(self, f"_{stage}")(target)
            parents = {name: m for name in NEEDS[stage] if (m := self.run.complete(name))}
            manifest = {
                "stage": stage,
                "key": key,
                "facts": self.facts(stage),
                "parents": {name: {"key": m["key"], "digest": runs.digest(m)} for name, m in parents.items()},
                "inputs": told.pop("inputs", {}),
                "outputs": runs.outputs_of(target, self.run.tuned.name if stage == "train" else "."),
                **told,
                "model": self.model.as_dict(),
                "seed": self.recipe.seed,
                "versions": runs.versions(),
                "machine": self.machine.as_dict(),
                "started": time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(started)),
                "seconds": round(time.time() - started, 1),
            }
            runs.write_json(target / "manifest.json", manifest)
        self.run.event("stage_finished", stage=stage, seconds=manifest["seconds"])
        from tunesmith.models.machine import give_back

        gc.collect()
        give_back()

    def held(self) -> Held | None:
        """Why the gate does not let this model be packaged; None where it does, or is overruled."""
        gate = (self.run.scores or {}).get("gate") or {}
        if self.recipe.package.force or not gate.get("enforced") or gate["decision"] != "hold":
            return None
        broken = "; ".join(f"{c['condition']} ({c['why']})" for c in gate["conditions"] if c["state"] == "broken")
        return Held(
            f"held by the gate: {broken}",
            where=str(self.run.path),
            fix="Train a better one, or overrule it: --set package.force=true (recorded).",
        )

    def look_ahead(self, stages: Sequence[str]) -> None:
        """Raise before training what would only come up after it: no test rows, no room for the result."""
        data = self.run.manifest("data") or {}
        counts = data["counts"]
        if held := ", ".join(f"{n:,} rows with {kind}" for kind, n in data.get("media", {}).items()):
            raise DataError(
                f"{held}: a model of text can't be shown them, and would learn to answer without",
                where="data.sources",
                fix="Take their words alone, or leave them out: --set data.media=words or drop.",
            )
        if "evaluate" in stages and not counts["test"]:
            raise DataError(
                "no test rows to prove anything on", where="data.split.test", fix="Hold some out, such as test: 0.1."
            )
        for path in self.named_files if "evaluate" in stages else ():
            if not path.is_file():
                fix = "Paths are relative to the recipe's folder; set the ${VARIABLES} that it uses."
                raise DataError(f"no such file: {path}", where="evaluate", fix=fix)
        weights = sum(p.stat().st_size for p in self.model.path.glob("*.safetensors"))
        runs.need_room(self.run.path, weights * (4 if "package" in stages else 1), "The run")

    def facts(self, stage: str) -> dict[str, Any]:
        """What a stage's result depends on, besides the stages before it."""
        r = self.recipe
        model = {"model": self.model.identity, "renderer": self.renderer.hash, "seed": r.seed}
        if stage == "data":
            # Where files lie does not matter, what they hold does.
            section = r.data.model_dump(mode="json", exclude={"sources": {"__all__": {"path", "sql"}}})
            for part in ("validation", "test"):
                given = section["split"][part]
                section["split"][part] = None if isinstance(given, str) else given
            section["clean"] = list(section["clean"].items())  # their order counts
            return model | {"section": section, "max_length": r.train.max_length, "sources": self.sources}
        if stage == "train":
            kept = r.train.model_dump(mode="json", exclude=NOT_IN_THE_RESULT)
            start = self.start and [runs.hash_file(path) for path in sorted(self.start.glob("*.safetensors"))]
            beside = ({"keep": self.kept_files} if self.kept_files else {}) | ({"start": start} if start else {})
            return model | {"section": kept} | beside | r.train.method.models
        kept = (r.evaluate if stage == "evaluate" else r.package).model_dump(mode="json")
        gate = r.gate.model_dump(mode="json") if r.gate else None
        goal = {"goal": r.goal.model_dump(mode="json")} | ({"gate": gate} if gate else {})
        return model | {"section": kept} | goal | ({"files": self.own_files} if self.own_files else {})

    @contextlib.contextmanager
    def artifact(self, stage: str, key: str) -> Iterator[Path]:
        """Where a stage writes. Only training keeps what a stopped attempt left, to go on from it."""
        if stage != "train":
            with runs.whole_folder(self.run.stage(stage)) as target:
                yield target
            return
        target = self.run.stage(stage)
        mark = target / "started.json"
        earlier = runs.read_json(mark)["key"] if mark.exists() else None
        if target.exists() and earlier != key:
            self._set_aside(target, earlier)
        target.mkdir(exist_ok=True)
        runs.write_json(mark, {"key": key})
        yield target

    def _set_aside(self, target: Path, key: str | None) -> None:
        """Keep what an earlier recipe trained, finished or not: hours may be in it."""
        if self.run.manifest("train") or self.run.checkpoints.is_dir():
            kept = self.run.path / "replaced" / f"train-{(key or 'unknown')[:8]}"
            say(f"train: its settings or rows changed; what was trained before is kept in {kept}")
            shutil.rmtree(kept, ignore_errors=True)
            kept.parent.mkdir(exist_ok=True)
            if self.run.metrics.exists():
                shutil.copyfile(self.run.metrics, target / "metrics.jsonl")
            target.replace(kept)
        else:
            shutil.rmtree(target)
        self.run.metrics.unlink(missing_ok=True)

    def _data(self, target: Path) -> dict[str, Any]:
        from tunesmith.data.prepare import prepare

        told = prepare(self.recipe.data, self.data_inputs(), target)
        if set(told["inputs"].values()) != {digest for _, digest in self.sources}:
            raise DataError(
                "a file changed while it was read", where="data.sources", fix="Run again once nothing writes to it."
            )
        say(f"data: {describe_counts(told['counts'])}")
        return told

    def _train(self, target: Path) -> dict[str, Any]:
        from tunesmith import plugins
        from tunesmith.train.inputs import TrainInputs
        from tunesmith.train.train import train

        by, figure = self.recipe.train.best_by, self.recipe.train.figure
        metric = plugins.load("metric", by) if figure is None else None
        if metric and (metric.likelihood or metric.chooses):
            raise RecipeError(
                f"{by} is not a score of answers",
                where="train.best_by",
                fix="Take loss or another figure of the validation, or a metric of answers: exact_match, rouge_l, ...",
            )
        machine = dataclasses.replace(self.machine, device=self.device)
        self.ranks.call("train")
        inputs = TrainInputs(
            self.rows("train"),
            self.rows("validation"),
            self.model,
            self.renderer,
            machine,
            self.recipe.seed,
            self.ask,
            self.score,
            self.validated,
            self.general(),
            self.start,
            self.ranks,
        )
        try:
            return {"summary": train(self.recipe.train, inputs, self.run)}
        except RuntimeError as error:
            lost = self.ranks.lost(error)
            if lost is None:
                raise
            raise lost from error

    def ask(self, forward: Any, rows: Sequence[Any], limit: int | None) -> list[str]:
        """Greedy answers of a model in training (of a plain text: how it goes on), of at most `limit` tokens; and a
        quarter more than the longest of the right ones (of the texts)."""
        from tunesmith import plugins
        from tunesmith.conversation.message import Text

        def prompt(row: Any) -> list[int]:
            plain = isinstance(row, Text)
            return renderer.text_ids(row.text, specials=False) if plain else renderer.prompt(row.prompt, row.tools)

        renderer = self.renderer
        right = [row.text if isinstance(row, Text) else row.answer for row in rows]
        longest = max(len(renderer.tokenizer(text, add_special_tokens=False)["input_ids"]) for text in right)
        most = self.recipe.evaluate.max_new_tokens or longest + longest // 4 + 8
        engine: Engine = plugins.load("engine", "transformers").over(forward)
        given = engine.generate(
            [prompt(r) for r in rows], min(most, limit or most), renderer.stop_ids, lambda done: None
        )
        return [renderer.decode(ids) for ids in given]

    def score(self, name: str, answers: Sequence[str], rows: Sequence[Any]) -> tuple[float, bool]:
        """A metric of answers to rows, and whether higher is better."""
        from tunesmith import plugins
        from tunesmith.evaluate.metrics import Answers

        metric = plugins.load("metric", name)
        none = [float("nan")] * len(rows)
        given = Answers(answers, [row.answer for row in rows], none, [0] * len(rows), [row.metadata for row in rows])
        return float(metric.value(metric.measure(given).sum(0))), metric.higher_is_better

    def _evaluate(self, target: Path) -> dict[str, Any]:
        from tunesmith.evaluate.evaluate import EvaluateInputs, evaluate

        answers = (self.run.manifest("data") or {})["answers"]
        inputs = EvaluateInputs(
            [row for row in self.rows("test") if getattr(row, "good", True)],  # a bad answer is no reference
            answers["kind"],
            self.recipe.goal.metric,
            {"baseline": self.subject(None), "tuned": self.subject(self.run.tuned)},
            self.recipe.seed,
            self.folder,
            self.recipe.gate,
            self.rows("train"),
            self.rows("validation"),
            self.judge(),
            self.run.review,
        )
        card = evaluate(self.recipe.evaluate, inputs, target)
        return {"verdict": card["verdict"], "gate": card["gate"]["decision"]}

    def _package(self, target: Path) -> dict[str, Any]:
        from tunesmith.package.card import card
        from tunesmith.package.package import PackageInputs, loading, package

        gate = (self.run.scores or {}).get("gate") or {}
        forced = self.recipe.package.force and gate.get("enforced") and gate["decision"] != "ship"
        rows = self.rows("test") or self.rows("train")
        told = package(self.recipe.package, PackageInputs(self.model, self.run.tuned, self.renderer, rows), target)
        card_text = card(self.run, self.model.as_dict(), loading(target / "model"), told.get("gguf", ()))
        runs.write_text(target / "model" / "README.md", card_text)
        return told | ({"forced": gate} if forced else {})


# What each stage reads of the others, and what it can do without.
NEEDS: dict[str, tuple[str, ...]] = {
    "data": (),
    "train": ("data",),
    "evaluate": ("data", "train"),
    "package": ("data", "train", "evaluate"),
}


OPTIONAL = {("package", "evaluate")}


# Keys of `train` that change what is kept or told of it, but no weight.
NOT_IN_THE_RESULT = {
    "snapshots",
    "keep_checkpoints",
    "checkpoint_every",
    "trackers",
    "samples",
    "start_from",
    "parallel",
}


def describe_counts(counts: dict[str, Any]) -> str:
    """The data stage's counts as a sentence."""
    removed = "".join(f", {n} removed ({step})" for step, n in counts["removed"].items())
    if counts.get("cut"):
        removed += f", {counts['cut']} cut"
    return (
        f"{counts['read']} rows read, {counts['accepted']} accepted, {counts['rejected']} rejected{removed}; "
        f"{counts['train']} to train on, {counts['validation']} for validation, {counts['test']} for the test"
    )
