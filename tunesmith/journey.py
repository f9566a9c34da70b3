"""One walk from recipe to package: what the stages need, and what each is handed of the others."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import runs
from tunesmith.errors import DataError, Held, RecipeError, RunError
from tunesmith.progress import clock, say
from tunesmith.recipe import Recipe
from tunesmith.runs import Run
from tunesmith.train.ranks import Ranks

if TYPE_CHECKING:
    from tunesmith.conversation.render import Renderer
    from tunesmith.data.section import DataSection
    from tunesmith.inference.engine import Engine
    from tunesmith.inference.subject import Kept, Subject
    from tunesmith.models.machine import Machine
    from tunesmith.models.resolve import ResolvedModel


@dataclass
class Journey:
    """One walk: what the stages need, made when it is first needed, and what each is handed of the others."""

    recipe: Recipe
    folder: Path
    run: Run
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

    @cached_property
    def machine(self) -> Machine:
        from tunesmith.models.machine import machine

        found = machine()
        if "peft" not in sys.modules:
            with clock("Loading torch and transformers", 8):
                import peft  # noqa: F401 (it imports both)
        return found

    @cached_property
    def model(self) -> ResolvedModel:
        from tunesmith.models.resolve import resolve

        assert self.machine  # its limits must be set before torch multiplies
        section = self.recipe.model
        beside = self.folder / section.name
        return resolve(section.model_copy(update={"name": str(beside)}) if beside.exists() else section)

    @cached_property
    def renderer(self) -> Renderer:
        from tunesmith.models.load import load_renderer

        renderer = load_renderer(self.model)
        if renderer.template_name == "plain":
            say(
                f"{self.model.name} has no chat template: using the built-in 'plain' one "
                "(System:/User:/Assistant:); model.chat_template takes another"
            )
        return renderer

    @cached_property
    def untouched(self) -> ResolvedModel:
        """The base without the words that training adds."""
        return dataclasses.replace(self.model, new_words=())

    @cached_property
    def baseline_renderer(self) -> Renderer:
        from tunesmith.models.load import load_renderer

        return load_renderer(self.untouched) if self.model.new_words else self.renderer

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
        counts = (self.run.manifest("data") or {})["counts"]
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
            return model | {"section": kept} | beside
        kept = (r.evaluate if stage == "evaluate" else r.package).model_dump(mode="json")
        gate = r.gate.model_dump(mode="json") if r.gate else None
        goal = {"goal": r.goal.model_dump(mode="json")} | ({"gate": gate} if gate else {})
        return model | {"section": kept} | goal | ({"files": self.own_files} if self.own_files else {})

    @cached_property
    def own_files(self) -> dict[str, str]:
        """Hashes of the files that `evaluate` names: a change in one changes what it finds."""
        return {path.name: runs.hash_file(path) for path in self.named_files if path.is_file()}

    @property
    def named_files(self) -> list[Path]:
        """The files that `evaluate` names."""
        evaluated, metrics = self.recipe.evaluate, [self.recipe.goal.metric or ""]
        named = [name.rpartition(":")[0] for name in (*metrics, *(evaluated.metrics or ())) if ".py:" in name]
        named += [name for name in (evaluated.bias.bbq, evaluated.bias.crows_pairs) if name] if evaluated.bias else []
        named += [suite.file for suite in evaluated.suites if suite.file]
        named += [evaluated.judge.human] if evaluated.judge and evaluated.judge.human else []
        return [self.folder / Path(os.path.expandvars(name)).expanduser() for name in named]

    @cached_property
    def files(self) -> dict[str, list[Any]]:
        """The data's files, fetched where they were elsewhere."""
        from tunesmith.data.sources import source_files

        return source_files(self.recipe.data, self.folder)

    @cached_property
    def start(self) -> Path | None:
        """The adapter or model that training starts from, if the recipe names one."""
        name = self.recipe.train.start_from
        return adapter_of(name, self.folder, self.run.path.parent) if name else None

    @cached_property
    def sources(self) -> list[tuple[str, str]]:
        """Names and hashes of the data's files, in the recipe's order."""
        paths = [path for part in self.files.values() for _, path in part]
        paths += [path for step in self.recipe.data.clean.values() for path in step.files(self.folder)]
        return [(path.name, runs.hash_file(path)) for path in paths]

    @cached_property
    def general_sources(self) -> dict[str, DataSection]:
        """The data that `train.keep` names, by the path given there, read as the recipe's own data."""
        from tunesmith.data.section import SourceSection, SplitSection

        named = [term.rows for term in self.recipe.train.keep if getattr(term, "rows", None)]
        none = SplitSection(validation=0, test=0)
        return {
            path: self.recipe.data.model_copy(update={"sources": [SourceSection(path=path)], "split": none})
            for path in named
        }

    @cached_property
    def kept_files(self) -> list[tuple[str, str]]:
        """Names and hashes of those files."""
        from tunesmith.data.prepare import source_files

        try:
            parts = [source_files(section, self.folder)["train"] for section in self.general_sources.values()]
        except DataError as error:
            raise DataError(error.what, where="train.keep", fix=error.fix) from None
        return [(path.name, runs.hash_file(path)) for part in parts for _, path in part]

    def general(self) -> dict[str, list[Any]]:
        """The rows of that data."""
        from tunesmith.data.prepare import load_rows, prepare

        found = {}
        for path, section in self.general_sources.items():
            with tempfile.TemporaryDirectory() as folder:
                prepare(section, self.data_inputs(), Path(folder))
                found[path] = load_rows(Path(folder) / "train.jsonl")
        return found

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

    def data_inputs(self) -> Any:
        from tunesmith.data.prepare import DataInputs
        from tunesmith.models.load import context_length
        from tunesmith.train import auto

        longest = auto.with_length(self.recipe.train, self.model)[0].max_length
        context = context_length(self.model) or longest
        if context < longest:
            say(f"rows may have {context} tokens, the model's context (train.max_length is {longest})")
        return DataInputs(
            self.renderer, min(longest, context), self.recipe.seed, self.folder, self.files, self._answers
        )

    def _answers(self, prompts: Sequence[Sequence[Any]], limit: int) -> list[str]:
        """What the base model answers, for rows that are made with it."""
        from tunesmith.progress import bar

        renderer = self.renderer
        ids = [renderer.prompt(list(prompt)) for prompt in prompts]
        with bar("Making rows", len(ids)) as progress:
            out = self.engine(None).generate(ids, limit, renderer.stop_ids, progress.advance)
        return [renderer.decode(answer) for answer in out]

    def rows(self, part: str) -> list[Any]:
        from tunesmith.data.prepare import load_rows

        return load_rows(self.run.stage("data") / f"{part}.jsonl")

    def _train(self, target: Path) -> dict[str, Any]:
        from tunesmith import plugins
        from tunesmith.train.inputs import TrainInputs
        from tunesmith.train.train import train

        by = self.recipe.train.best_by
        metric = plugins.load("metric", by)
        if by != "loss" and (metric.likelihood or metric.chooses):
            raise RecipeError(
                f"{by} is not a score of answers",
                where="train.best_by",
                fix="Take loss, or a metric of answers: exact_match, rouge_l, ...",
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
        """Greedy answers of a model in training, of at most `limit` tokens (a quarter more than the longest of the
        right ones if None)."""
        from tunesmith import plugins

        tokenizer = self.renderer.tokenizer
        longest = max(len(tokenizer(row.answer, add_special_tokens=False)["input_ids"]) for row in rows)
        most = self.recipe.evaluate.max_new_tokens or longest + longest // 4 + 8
        engine: Engine = plugins.load("engine", "transformers").over(forward)
        prompts = [self.renderer.prompt(row.prompt) for row in rows]
        given = engine.generate(prompts, min(most, limit or most), self.renderer.stop_ids, lambda done: None)
        return [self.renderer.decode(ids) for ids in given]

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

    def judge(self) -> Kept | None:
        """The model that `evaluate.judge` names, if it names one."""
        from tunesmith.models.section import ModelSection

        section = self.recipe.evaluate.judge
        if section is None:
            return None
        asked = endpoint(section.model, self.run)
        if asked is not None:
            return asked
        recipe = self.recipe.model_copy(update={"model": ModelSection(name=os.path.expandvars(section.model))})
        return Journey(recipe, self.folder, self.run).kept(self.run, None, section.model)

    def kept(self, there: Run, adapter: Path | None, name: str) -> Kept:
        """The journey's model with an adapter, its answers kept in a run's folder."""
        from tunesmith.inference.subject import Kept, Local

        renderer, tokenizer = self.renderer, self.renderer.tokenizer
        weights = {p.name: runs.hash_file(p) for p in sorted(adapter.glob("*.safetensors"))} if adapter else None
        state = [self.model.identity, renderer.hash, weights, self.machine.precision]
        return Kept(
            there.answers / f"model-{runs.hash_json(state)[:16]}.jsonl",
            name,
            lambda: Local(name, self.engine(adapter), renderer),
            lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
        )

    def subject(self, adapter: Path | None) -> Kept:
        """The base, or what was trained of it, as something to ask; its answers are kept in the run's folder."""
        from tunesmith.inference.subject import Kept

        trained = self.run.complete("train") if adapter else None
        renderer = self.renderer if adapter else self.baseline_renderer
        state = [self.model.identity, renderer.hash, runs.digest(trained) if trained else None]
        engine = self.recipe.evaluate.engine
        likely = engine == "transformers"  # the others give no likelihoods
        state += [] if likely else [engine]
        name = "tuned" if adapter else "baseline"
        tokenizer = renderer.tokenizer
        return Kept(
            self.run.answers / f"{name}-{runs.hash_json([*state, self.machine.precision])[:16]}.jsonl",
            self.run.name if adapter else self.model.name,
            lambda: self._opened(name, adapter),
            lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
            scores=likely,
        )

    def _opened(self, name: str, adapter: Path | None) -> Subject:
        from tunesmith.inference.subject import Local
        from tunesmith.models.load import classes_of

        if adapter and classes_of(adapter):
            from tunesmith.inference.scorer import Scorer

            return Scorer(name, self.model, self.machine, adapter, self.renderer)
        renderer = self.renderer if adapter else self.baseline_renderer
        return Local(name, self.engine(adapter, self.recipe.evaluate.engine), renderer)

    def talker(self, adapter: Path | None, engine: str = "transformers") -> Any:
        """What a chat asks: a language model, or the classes of a model that tells such apart."""
        from tunesmith.models.load import classes_of

        classes = classes_of(adapter) if adapter else []
        if len(classes) == 1:
            raise RunError("scores answers and gives none", where=str(self.run.path), fix="Chat with the base: --base.")
        return self._opened("tuned", adapter) if classes else self.engine(adapter, engine)

    def engine(self, adapter: Path | None, kind: str = "transformers") -> Engine:
        from tunesmith import plugins

        machine = self.machine  # first: its limits must stand before torch is there
        model = self.model if adapter else self.untouched
        engine: Engine = plugins.load("engine", kind)(model, machine, adapter)
        return engine

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


def endpoint(name: str, there: Run) -> Kept | None:
    """What lies behind an address as something to ask, its answers kept in a run's folder; None for another name."""
    from tunesmith.inference.endpoint import Endpoint, about_tokens, is_endpoint
    from tunesmith.inference.subject import Kept

    if not is_endpoint(os.path.expandvars(name)):
        return None
    found = Endpoint(name)
    path = there.answers / f"endpoint-{runs.hash_json(found.name)[:16]}.jsonl"
    return Kept(path, found.model, lambda: found, about_tokens, scores=False)


def describe_counts(counts: dict[str, Any]) -> str:
    """The data stage's counts as a sentence."""
    removed = "".join(f", {n} removed ({step})" for step, n in counts["removed"].items())
    if counts.get("cut"):
        removed += f", {counts['cut']} cut"
    return (
        f"{counts['read']} rows read, {counts['accepted']} accepted, {counts['rejected']} rejected{removed}; "
        f"{counts['train']} to train on, {counts['validation']} for validation, {counts['test']} for the test"
    )


def adapter_of(name: str, folder: Path, runs_folder: str | Path | None) -> Path:
    """The folder of an adapter or model: `name` itself, as a path from here or from `folder`, or what a run trained.

    Raises:
        RunError: neither is there, or the run is not trained.
    """
    for path in (folder / name, Path(name)):
        if any(path.glob("*.safetensors")):
            return path
    run = runs.get(name, runs_folder)
    if not any(run.tuned.glob("*.safetensors")):
        raise RunError("is not trained yet", where=str(run.path), fix="Finish it: tunesmith run RECIPE")
    return run.tuned
