"""The whole journey: recipe -> data -> train -> evaluate -> package. A stage that is up to date is skipped."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith import claims, progress, runs
from tunesmith import recipe as recipes
from tunesmith.errors import Interrupted, RunError, TrainingError
from tunesmith.journey import Journey
from tunesmith.kit import Kit
from tunesmith.progress import say
from tunesmith.recipe import Recipe
from tunesmith.runs import STAGES, Run
from tunesmith.train.ranks import Ranks

if TYPE_CHECKING:
    from tunesmith.conversation.render import Renderer
    from tunesmith.inference.engine import Engine


def run(
    recipe: str | Path | dict[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    runs_folder: str | Path | None = None,
    stages: Sequence[str] = STAGES,
    validated: Callable[[int, float], None] | None = None,
) -> Result:
    """Walk the journey, or some of its stages, and return the run.

    Under torchrun every rank calls this: the first one does all, the others help it to train and return then.

    Args:
        recipe: a file, the name of a shipped recipe, or a recipe's keys.
        overrides: `key.path=value`, as `--set` takes them.
        runs_folder: where runs go; TUNESMITH_RUNS or ./runs if None.
        validated: told the step and the value of `train.best_by` at each validation; what it raises ends the training.

    Raises:
        TunesmithError: one of its kinds; see tunesmith/errors.py.
    """
    resolved, folder, origin = open_recipe(recipe, overrides)
    there = Run(runs.runs_folder(runs_folder) / resolved.name)
    wanted = (stages,) if isinstance(stages, str) else tuple(stages)
    unknown = [stage for stage in wanted if stage not in STAGES]
    if unknown:
        raise RunError(f"no stage is called '{unknown[0]}'", where="stages", fix=f"There are: {', '.join(STAGES)}.")
    ranks = Ranks.of_environment()
    if not ranks.main:
        _help(Journey(resolved, folder, there, ranks=ranks))
        return Result(there)
    with there.lock():
        claims.refuse_anothers(there, claims.absolute(resolved, folder), origin)
        journey = Journey(resolved, folder, there, validated, ranks)
        journey.key(next(s for s in STAGES if s in wanted))  # what can't be run leaves the run as it was
        claims.claim(there, claims.absolute(resolved, folder), origin, overrides)
        for stage in STAGES:
            if stage in wanted:
                if stage == "train":
                    journey.look_ahead(wanted)
                if stage == "package" and (held := journey.held()) is not None:
                    if "evaluate" not in wanted:
                        raise held
                    say(f"package: {held.what}")
                    break
                journey.walk(stage)
                _finish(there, resolved)  # after each, so that a later one's failure hides nothing
            if stage == "train":
                journey.dismiss()
    return Result(there)


def _help(journey: Journey) -> None:
    """What a rank that is not the first does: it trains with the others, if there is training to do.

    Training that was stopped, or went wrong for all, is the first rank's to tell.
    """
    progress.quiet()
    assert journey.device
    with contextlib.suppress(Interrupted, TrainingError):
        if journey.ranks.called():
            journey._train(journey.run.stage("train"))
    journey.dismiss()


def open_recipe(
    recipe: str | Path | dict[str, Any] | Recipe, overrides: Sequence[str] = ()
) -> tuple[Recipe, Path, str | None]:
    """The recipe, the folder that its paths are relative to, and where it came from (None: from Python)."""
    if isinstance(recipe, Recipe):
        recipe = recipe.model_dump(mode="json")
    if isinstance(recipe, dict):
        return recipes.build(json.loads(json.dumps(recipe)), overrides), Path.cwd(), None
    resolved, folder = recipes.load(recipe, overrides)
    return resolved, folder, str(recipes.find(str(recipe)).resolve())


def _finish(run: Run, recipe: Recipe) -> None:
    """Bring the files at the run's top up to date with its stages; the run's manifest comes last."""
    done = {stage: m for stage in STAGES if (m := run.complete(stage))}
    told = (run.manifest() or {}).get("stages", {})
    copies = {}
    if "evaluate" in done:
        copies[run.scorecard] = (run.stage("evaluate") / "scorecard.json").read_text(encoding="utf-8")
    if "package" in done:
        copies[run.card] = (run.model / "README.md").read_text(encoding="utf-8")
    current = {s: m["key"] for s, m in done.items()} == {s: m["key"] for s, m in told.items()}
    for stage, files in {"evaluate": (run.scorecard, run.report), "package": (run.card,)}.items():
        for path in files if stage not in done else ():
            path.unlink(missing_ok=True)  # of what was trained before
    there = all(path.is_file() and path.read_text(encoding="utf-8") == text for path, text in copies.items())
    if current and there and ("evaluate" not in done or run.report.is_file()):
        return
    for path, text in copies.items():
        runs.write_text(path, text)
    if "evaluate" in done:
        from tunesmith.evaluate.report import write_report

        write_report(run)
    runs.write_json(
        run.path / "manifest.json",
        {
            "name": run.name,
            "recipe": runs.hash_json(recipe.model_dump(mode="json")),
            "seed": recipe.seed,
            "stages": {
                stage: {
                    "key": m["key"],
                    "digest": runs.digest(m),
                    "parents": m["parents"],
                    "started": m["started"],
                    "seconds": m["seconds"],
                }
                for stage, m in done.items()
            },
            "model": next(iter(done.values()))["model"] if done else None,
            "versions": runs.versions(),
        },
    )


@dataclass
class Result:
    """A run, with what can be asked of it."""

    run: Run
    _loaded: dict[Any, Chatter] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def path(self) -> Path:
        return self.run.path

    @property
    def scorecard(self) -> dict[str, Any] | None:
        """Verdict, goal and every metric with n and 95% intervals; None before evaluation."""
        return self.run.scores

    @property
    def report(self) -> Path:
        return self.run.report

    @property
    def manifest(self) -> dict[str, Any] | None:
        return self.run.manifest()

    def chat(self, text: str, base: bool = False, max_new_tokens: int = 512, engine: str = "transformers") -> str:
        """The tuned model's answer (or the base's) to one message, under the recipe's system prompt."""
        return self.chatter(base, engine).reply(text, [], max_new_tokens=max_new_tokens)

    def chatter(self, base: bool = False, engine: str = "transformers") -> Chatter:
        """The tuned model (or the base), loaded and ready to talk; kept in memory while this result is and the run's
        training is the same. `engine`: what answers (docs/engines.md)."""
        trained = self.run.complete("train")
        if not trained and not base:
            raise RunError("is not trained yet", where=str(self.path), fix="Finish it: tunesmith run RECIPE")
        key = base, engine, runs.digest(trained) if trained else None
        if key not in self._loaded:
            self._loaded = {other: kept for other, kept in self._loaded.items() if other[2] == key[2]}
            self._loaded[key] = self._load(base, engine)
        return self._loaded[key]

    def _load(self, base: bool, engine: str) -> Chatter:
        recipe, folder = recipes.load(self.run.recipe)
        kit = Kit(recipe, folder, self.run)
        data = self.run.manifest("data") or {}
        trained_on = (self.run.manifest("train") or {}).get("model", {}).get("identity")
        if not base and trained_on != kit.model.identity:
            raise RunError(
                "was trained on another base model than the recipe names now",
                where=str(self.path),
                fix="Run the recipe again.",
            )
        talker = kit.talker(None if base else self.run.tuned, engine)
        renderer = kit.baseline_renderer if base else kit.renderer
        return Chatter(talker, renderer, data.get("system", recipe.data.system))


def _ignore(text: str) -> None:
    pass


@dataclass
class Chatter:
    """A model in memory, rendered to and read from as in training."""

    engine: Engine
    renderer: Renderer
    system: str | None

    def reply(
        self, text: str, history: list[Any], on_text: Callable[[str], None] = _ignore, max_new_tokens: int = 512
    ) -> str:
        """Answer `text` after `history` (to which both are added); pieces go to `on_text` as they come."""
        from tunesmith.conversation.message import Message

        if self.system is not None and not history:
            history.append(Message("system", self.system))
        history.append(Message("user", text))
        ids: list[int] = []
        shown = ""

        def show(token: int) -> None:
            nonlocal shown
            ids.append(token)
            text = self.renderer.decode(ids)
            if not text.endswith("\ufffd"):  # half a character: wait for the rest
                on_text(text[len(shown) :])
                shown = text

        prompt = self.renderer.prompt(history)
        out = self.engine.stream(prompt, max_new_tokens, self.renderer.stop_ids, show)
        answer = self.renderer.decode(out)
        history.append(Message("assistant", answer))
        return answer


def open_run(name: str, runs_folder: str | Path | None = None) -> Result:
    """A run that exists, by name or path."""
    return Result(runs.get(name, runs_folder))
