"""What `tunesmith serve` is given -> models that answer: runs, folders, hub ids, GGUF files, adapters on a base."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import recipe as recipes
from tunesmith import runs
from tunesmith.errors import ModelError, RecipeError, RunError
from tunesmith.journey import Journey
from tunesmith.models.arrays import adapter_config, is_plain_lora
from tunesmith.models.section import ModelSection
from tunesmith.runs import Run
from tunesmith.serve.models import Models, Served
from tunesmith.serve.section import ServeSection

if TYPE_CHECKING:
    from tunesmith.models.resolve import ResolvedModel


@dataclass
class Opening:
    """Models that are being put together.

    Args:
        force: serve what the gate holds, too; the run records it.
        base: the base of adapters that name none.
    """

    settings: ServeSection
    runs_folder: Path | None = None
    force: bool = False
    base: str | None = None
    models: Models = field(default_factory=Models)
    _bases: dict[str, Served] = field(default_factory=dict)
    _fetching: asyncio.Lock = field(default_factory=asyncio.Lock)

    def open(self, target: str, force: bool = False) -> str:
        """Put a target, or NAME=TARGET, among the models; returns the name under which it will answer.

        Raises:
            TunesmithError: there is no such thing, or the gate holds it.
        """
        name, given = _named(target)
        run = _run(given, self.runs_folder)
        if run is not None:
            return self._run(name or run.name, run, force or self.force)
        folder = Path(given).expanduser()
        if (folder / "adapter_config.json").is_file():
            return self.adapter(name or folder.name, folder)
        served = self._base(resolved(given), name or _short(given))
        return self._also(served, name).name if name else served.name

    async def fetch(self, name: str, force: bool = False) -> None:
        """Open a target while others answer; `force` as of the class, for this one alone.

        Raises:
            TunesmithError: as `open`.
        """
        async with self._fetching:
            await asyncio.to_thread(self.open, name, force)
            await self.models.begin()

    def adapter(self, name: str, folder: Path) -> str:
        """Put an adapter's folder among the models, on the base that it names or the first that is there."""
        self._free(name)
        told = adapter_config(folder)
        first = next((b for b in self._bases.values() if self.models.holds(b)), None)
        if self.base is None and first is not None:
            base = first
        else:
            of = self.base or told.get("base_model_name_or_path")
            if not of:
                raise ModelError("names no base model", where=str(folder), fix="Give it: --base MODEL")
            base = self._base(resolved(of), _short(of))
        self.models.later(name, base.name, folder)
        return name

    def _run(self, name: str, run: Run, force: bool) -> str:
        recipe, folder = recipes.load(run.recipe)
        journey = Journey(recipe, folder, run)
        if run.complete("train") is None:
            raise RunError("is not trained yet", where=str(run.path), fix="Finish it: tunesmith run RECIPE")
        held = journey.held()
        if held is not None:
            if not force:
                held.fix = "Train a better one, or serve it all the same: --force (recorded)."
                raise held
            run.event("served_though_held", gate=(run.scores or {})["gate"])
        system = (run.manifest("data") or {}).get("system", recipe.data.system)
        identity = runs.hash_json(run.manifest("train"))
        if is_plain_lora(run.tuned) and not journey.model.new_words:
            self._free(name)
            base = self._base(journey.model, _short(journey.model.name))
            self.models.later(name, base.name, run.tuned, system=system, renderer=journey.renderer, identity=identity)
            return name
        packaged = run.complete("package")
        if packaged is None or not packaged.get("merged", True):
            raise RunError(
                "what was trained is no plain LoRA adapter, so it is served as the package stage merges it",
                where=str(run.path),
                fix="Package it first: tunesmith package RECIPE",
            )
        served = self._also(self._base(resolved(str(run.model)), name, identity), name)
        self.models.soon(replace(served, system=system, root=str(run.model)))
        return name

    def _also(self, served: Served, name: str) -> Served:
        """A model that is there already under another name, under this one too."""
        if served.name == name:
            return served
        self._free(name)
        self.models.soon(replace(served, name=name))
        return replace(served, name=name)

    def _free(self, name: str) -> None:
        if self.models.taken(name):
            raise RunError(f"two models would be called '{name}'", fix="Give one another name: NAME=TARGET.")

    def _base(self, model: ResolvedModel, name: str, identity: str | None = None) -> Served:
        """A whole model, with an engine of its own; the one that is there already, if it is the same."""
        from tunesmith.models.load import load_renderer

        key = identity or model.identity
        known = self._bases.get(key)
        if known is None or not self.models.holds(known):
            self._free(name)
            engine = self.settings.engine.build(name, model)
            served = Served(name, engine, load_renderer(model), root=str(model.path), identity=key)
            self.models.soon(served)
            self._bases[key] = served
        return self._bases[key]


def settings_of(targets: Sequence[str], sets: Sequence[str], runs_folder: Path | None) -> ServeSection:
    """The `serve:` keys: those of the first run among the targets, changed by `--set KEY=VALUE`.

    Raises:
        RecipeError: a key is wrong.
    """
    run = next((r for t in targets if (r := _run(_named(t)[1], runs_folder))), None)
    overrides = [f"serve.{s}" for s in sets]
    if run is None:
        raw: dict[str, Any] = {"name": "serve", "model": "none", "data": {"sources": [{"path": "none"}]}}
        return recipes.build(raw, overrides, "--set").serve
    recipe, folder = recipes.load(run.recipe)
    raw = recipe.model_dump(mode="json")
    if (retrieve := raw["serve"].get("retrieve")) and retrieve.get("folder"):
        retrieve["folder"] = str(folder / retrieve["folder"])
    for guard in raw["serve"]["guards"]:
        if guard.get("file"):
            guard["file"] = str(folder / guard["file"])
    return recipes.build(raw, overrides, "--set").serve


def _named(target: str) -> tuple[str | None, str]:
    name, mark, rest = target.partition("=")
    return (name, rest) if mark and name and "/" not in name else (None, target)


def _run(name: str, runs_folder: Path | None) -> Run | None:
    try:
        return runs.get(name, runs_folder)
    except (RunError, RecipeError):
        return None


def resolved(name: str) -> ResolvedModel:
    """A base model, by what a recipe's `model` takes; this process keeps the machine's limits from here on."""
    from tunesmith.models.machine import machine
    from tunesmith.models.resolve import resolve

    machine()  # its limits must stand before torch is there
    return resolve(ModelSection(name=name))


def _short(name: str) -> str:
    """What a model is called: a hub id as it is, a file or folder by its last part."""
    path = Path(name).expanduser()
    return path.stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else name
