"""What a recipe stands for: its machine, model, renderer, files, rows and engines, made when they are first needed."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import runs
from tunesmith.errors import DataError, RunError
from tunesmith.progress import clock, say
from tunesmith.recipe import Recipe
from tunesmith.runs import Run

if TYPE_CHECKING:
    from tunesmith.conversation.render import Renderer
    from tunesmith.data.section import DataSection
    from tunesmith.inference.engine import Engine
    from tunesmith.inference.kept import Kept
    from tunesmith.inference.subject import Subject
    from tunesmith.models.machine import Machine
    from tunesmith.models.resolve import ResolvedModel


@dataclass
class Kit:
    """What a recipe stands for, of one run; each part is made when it is first needed.

    Attributes:
        folder: what the recipe's paths are relative to.
    """

    recipe: Recipe
    folder: Path
    run: Run

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

    @cached_property
    def files(self) -> dict[str, list[Any]]:
        """The data's files, fetched where they were elsewhere."""
        from tunesmith.data.sources import source_files

        return source_files(self.recipe.data, self.folder)

    @cached_property
    def sources(self) -> list[tuple[str, str]]:
        """Names and hashes of the data's files, in the recipe's order."""
        paths = [path for part in self.files.values() for _, path in part]
        paths += [path for step in self.recipe.data.clean.values() for path in step.files(self.folder)]
        return [(path.name, runs.hash_file(path)) for path in paths]

    @property
    def named_files(self) -> list[Path]:
        """The files that `evaluate` names."""
        evaluated, metrics = self.recipe.evaluate, [self.recipe.goal.metric or ""]
        named = [name.rpartition(":")[0] for name in (*metrics, *(evaluated.metrics or ())) if ".py:" in name]
        named += [name for name in (evaluated.bias.bbq, evaluated.bias.crows_pairs) if name] if evaluated.bias else []
        named += [suite.file for suite in evaluated.suites if suite.file]
        named += [evaluated.json_schema] if evaluated.json_schema else []
        named += [evaluated.judge.human] if evaluated.judge and evaluated.judge.human else []
        return [self.folder / Path(os.path.expandvars(name)).expanduser() for name in named]

    @cached_property
    def own_files(self) -> dict[str, str]:
        """Hashes of the files that `evaluate` names: a change in one changes what it finds."""
        from tunesmith.data.sources import told_apart

        called = told_apart(path for path in self.named_files if path.is_file())
        return {name: runs.hash_file(path) for path, name in called.items()}

    @cached_property
    def start(self) -> Path | None:
        """The adapter or model that training starts from, if the recipe names one."""
        name = self.recipe.train.start_from
        return adapter_of(name, self.folder, self.run.path.parent) if name else None

    @cached_property
    def general_sources(self) -> dict[str, DataSection]:
        """The data that `train.keep` names, by the path given there, read and cleaned as the recipe's own data."""
        from tunesmith.data.section import SourceSection, SplitSection

        named = [term.rows for term in self.recipe.train.keep if getattr(term, "rows", None)]
        none = SplitSection(validation=0, test=0)
        as_they_are = {"split": none, "mix": {}, "balance": None, "augment": [], "canaries": 0}
        return {
            path: self.recipe.data.model_copy(update={"sources": [SourceSection(path=path)], **as_they_are})
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
                prepare(section, dataclasses.replace(self.data_inputs(), files=None), Path(folder))
                found[path] = load_rows(Path(folder) / "train.jsonl")
        return found

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
        return Kit(recipe, self.folder, self.run).kept(self.run, None, section.model)

    def kept(self, there: Run, adapter: Path | None, name: str, engine: str = "transformers") -> Kept:
        """The recipe's model with an adapter, its answers kept in a run's folder."""
        from tunesmith.inference.kept import Kept

        tokenizer, likely = self.renderer.tokenizer, engine == "transformers"  # the others give no likelihoods
        weights = {p.name: runs.hash_file(p) for p in sorted(adapter.glob("*.safetensors"))} if adapter else None
        state = [self.model.identity, self.renderer.hash, weights, self.machine.precision]
        state += [] if likely else [engine]
        origin = self.model.as_dict() | {"adapter": weights, "precision": self.machine.precision, "engine": engine}
        return Kept(
            there.answers / f"model-{runs.hash_json(state)[:16]}.jsonl",
            name,
            lambda: self._opened(name, adapter, engine),
            lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
            scores=likely,
            origin={key: value for key, value in origin.items() if value is not None},
        )

    def subject(self, adapter: Path | None) -> Kept:
        """The base, or what was trained of it, as something to ask; its answers are kept in the run's folder."""
        from tunesmith.inference.kept import Kept

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
            lambda: self._opened(name, adapter, engine),
            lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"]),
            scores=likely,
        )

    def _opened(self, name: str, adapter: Path | None, engine: str) -> Subject:
        from tunesmith.inference.subject import Local
        from tunesmith.models.load import classes_of

        if adapter and classes_of(adapter):
            from tunesmith.inference.scorer import Scorer

            return Scorer(name, self.model, self.machine, adapter, self.renderer)
        renderer = self.renderer if adapter else self.baseline_renderer
        return Local(name, self.engine(adapter, engine), renderer)

    def talker(self, adapter: Path | None, engine: str = "transformers") -> Any:
        """What a chat asks: a language model, or the classes of a model that tells such apart."""
        from tunesmith.models.load import classes_of

        classes = classes_of(adapter) if adapter else []
        if len(classes) == 1:
            raise RunError("scores answers and gives none", where=str(self.run.path), fix="Chat with the base: --base.")
        return self._opened("tuned", adapter, engine) if classes else self.engine(adapter, engine)

    def engine(self, adapter: Path | None, kind: str = "transformers") -> Engine:
        from tunesmith import plugins

        machine = self.machine  # first: its limits must stand before torch is there
        model = self.model if adapter else self.untouched
        engine: Engine = plugins.load("engine", kind)(model, machine, adapter)
        return engine


def endpoint(name: str, there: Run) -> Kept | None:
    """What lies behind an address as something to ask, its answers kept in a run's folder; None for another name."""
    from tunesmith.inference.endpoint import Endpoint, about_tokens, is_endpoint
    from tunesmith.inference.kept import Kept

    if not is_endpoint(os.path.expandvars(name)):
        return None
    found = Endpoint(name)
    path = there.answers / f"endpoint-{runs.hash_json(found.name)[:16]}.jsonl"
    origin = {"source": "endpoint", "name": found.name}
    return Kept(path, found.model, lambda: found, about_tokens, scores=False, origin=origin)


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
