"""`tunesmith tune`: a search over a recipe's settings with Optuna, kept in a database so that it can go on."""

from __future__ import annotations

import importlib.util
import json
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from filelock import FileLock, Timeout

from tunesmith import claims, pipeline, runs
from tunesmith import recipe as recipes
from tunesmith.errors import MachineError, RecipeError, RunError, TunesmithError
from tunesmith.kit import adapter_of
from tunesmith.progress import say
from tunesmith.recipe import Recipe
from tunesmith.train.section import TrainSection

if TYPE_CHECKING:
    import optuna

Validated = Callable[[int, float], None]


@dataclass(frozen=True)
class Search:
    """A search's folder and what is searched.

    Attributes:
        folder: `study.db`, `trials/` (a run each), `best.yaml`.
        recipe: the keys of the recipe that the trials vary, its paths absolute.
        maximize: whether a higher value of `train.best_by` is better.
    """

    folder: Path
    recipe: dict[str, Any]
    maximize: bool

    @property
    def section(self) -> Any:
        return Recipe.model_validate(self.recipe).tune

    @property
    def url(self) -> str:
        return f"sqlite:///{(self.folder / 'study.db').resolve()}"

    def run(self, name: str, params: dict[str, Any], validated: Validated | None) -> float:
        """Train with some settings; returns the best validation's value of `train.best_by`."""
        keys = self.recipe | {"name": name}
        done = pipeline.run(keys, overrides(params), self.folder / "trials", ("data", "train"), validated)
        return float((done.run.manifest("train") or {})["summary"]["best_value"])

    def keep_best(self, params: dict[str, Any]) -> Path:
        """Write the recipe with these settings."""
        best = recipes.build(self.recipe | {"name": f"{self.recipe['name']}-best"}, overrides(params))
        path = self.folder / "best.yaml"
        runs.write_text(path, yaml.safe_dump(claims.absolute(best, self.folder), sort_keys=False, allow_unicode=True))
        return path


def overrides(params: dict[str, Any]) -> list[str]:
    """Settings as `--set` takes them."""
    return [f"{key}={json.dumps(value)}" for key, value in params.items()]


def tune(
    recipe: str | Path | dict[str, Any] | Recipe,
    overrides: Sequence[str] = (),
    runs_folder: str | Path | None = None,
    space: Sequence[str] = (),
) -> dict[str, Any]:
    """Search a recipe's `tune.space`, going on from what was tried before.

    Args:
        recipe, overrides, runs_folder: as `tunesmith.run` takes them.
        space: more of the space, as `key=values`.

    Returns:
        best (settings, value), recipe (the file of the best), and every trial.

    Raises:
        RecipeError: there is nothing to search over, or nothing to compare by.
        MachineError: the engine is not installed.
        TunesmithError: every trial failed; the last one's reason.
    """
    resolved, folder, _ = pipeline.open_recipe(recipe, overrides)
    keys = claims.absolute(resolved, folder)
    for given in space:
        key, equals, values = given.partition("=")
        if not equals:
            raise RecipeError(f"'{given}' is not key=values", where="--space", fix="As train.learning_rate=1e-4..1e-2.")
        keys["tune"]["space"][key.strip()] = recipes.value_of(values, f"--space {key}")
    section = recipes.build(keys).tune
    keys["tune"] = section.model_dump(mode="json")
    if not section.space:
        raise RecipeError(
            "there is nothing to search over",
            where="tune.space",
            fix="Say what may change, as --space train.learning_rate=1e-4..1e-2 --space train.adapter.rank=[8,16,32].",
        )
    if resolved.data.split.validation == 0:
        raise RecipeError(
            "trials are compared on validation rows, and there are none",
            where="data.split.validation",
            fix="Hold some out, such as validation: 0.1.",
        )
    package = section.engine
    if importlib.util.find_spec(package) is None:
        extra = "tune" if package == "optuna" else package
        raise MachineError(
            f"tune needs {package}, which is not installed",
            where="tune.engine",
            fix=f"pip install 'tunesmith[{extra}]'",
        )
    there = (runs.runs_folder(runs_folder) / f"{resolved.name}-tune").resolve()  # workers may start elsewhere
    if keys["train"]["start_from"]:
        keys["train"]["start_from"] = str(adapter_of(keys["train"]["start_from"], folder, runs_folder).resolve())
    search = Search(there, keys, _maximize(resolved.train))
    there.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(there / ".lock", timeout=0):
            _refuse_anothers(search)
            if section.engine == "ray":
                from tunesmith.tune.on_ray import search_on_ray

                return search_on_ray(search)
            return _search(search)
    except Timeout:
        raise RunError("is being searched by another process", where=str(there), fix="Wait for it.") from None


def _refuse_anothers(search: Search) -> None:
    """Keep what trials have in common, and raise where an earlier search in this folder was over something else. How
    many trials there are, and how far a range reaches, may change; so may what else the space holds."""
    kept = search.folder / "search.json"
    now = {key: search.recipe[key] for key in ("model", "data", "train", "seed")}
    for key, values in search.section.space.items():
        kind = values if isinstance(values, list) else {"whole": values.whole, "log": values.logarithmic}
        now[f"tune.space: {key}"] = kind
    before = runs.read_json(kept) if kept.is_file() else {}
    differing = [key for key, value in now.items() if before.get(key, value) != value]
    if differing:
        raise RunError(
            f"an earlier search there had other settings of: {', '.join(differing)}; their trials can't be compared",
            where=str(search.folder),
            fix="Search under another name (--set name=...), or remove that folder.",
        )
    runs.write_json(kept, before | now)


def _maximize(train: TrainSection) -> bool:
    from tunesmith import plugins

    figure = train.figure
    return bool(plugins.load("metric", train.best_by).higher_is_better) if figure is None else figure


def _search(search: Search) -> dict[str, Any]:
    study = _study(search, 0)
    _go_on(study)
    workers = search.section.workers
    if workers == 1:
        _work(search, 0)
    else:
        context = multiprocessing.get_context("spawn")
        before = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // workers))
        crew = [context.Process(target=_work, args=(search, number)) for number in range(workers)]
        try:
            for process in crew:
                process.start()
            for process in crew:
                process.join()
        except KeyboardInterrupt:
            for process in crew:
                process.terminate()
            raise
        finally:
            os.environ.pop("OMP_NUM_THREADS")
            os.environ.update({"OMP_NUM_THREADS": before} if before else {})
    trials = [_told(trial) for trial in study.get_trials(deepcopy=False) if not trial.user_attrs.get("left")]
    if not any(trial["state"] == "complete" for trial in trials):
        why = next((trial["why"] for trial in reversed(trials) if trial["why"]), "they were stopped")
        raise TunesmithError(f"no trial came through: {why}", where=str(search.folder), fix="Look at tune.space.")
    best = study.best_trial
    return {
        "best": {"settings": best.params, "value": best.value, "trial": _name(best)},
        "recipe": str(search.keep_best(best.params)),
        "metric": search.recipe["train"]["best_by"],
        "trials": trials,
    }


def _study(search: Search, worker: int) -> optuna.Study:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    section = search.section
    none = optuna.pruners.NopPruner()
    return optuna.create_study(
        storage=optuna.storages.RDBStorage(search.url, engine_kwargs={"connect_args": {"timeout": 60}}),
        study_name=search.recipe["name"],
        load_if_exists=True,
        direction="maximize" if search.maximize else "minimize",
        sampler=optuna.samplers.TPESampler(seed=search.recipe["seed"] + worker),
        pruner=optuna.pruners.MedianPruner(section.try_first, n_min_trials=2) if section.pruning else none,
    )


def _go_on(study: optuna.Study) -> None:
    """Queue again what an earlier search left in the middle, under its own run, which goes on from its checkpoint."""
    from optuna.trial import TrialState

    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study._storage.set_trial_user_attr(trial._trial_id, "left", True)
        study.tell(trial.number, state=TrialState.FAIL)
        if trial.params:
            study.enqueue_trial(trial.params, user_attrs={"run": _name(trial)})


def _name(trial: Any) -> str:
    return str(trial.user_attrs.get("run", f"trial-{trial.number:04d}"))


def _work(search: Search, worker: int) -> None:
    """Try settings until there are enough trials."""
    from optuna.trial import TrialState

    study, section = _study(search, worker), search.section

    def objective(trial: Any) -> float:
        import optuna

        params = {key: _suggest(trial, key, values) for key, values in section.space.items()}

        def validated(step: int, value: float) -> None:
            trial.report(value, step)
            if section.pruning and trial.should_prune():
                raise optuna.TrialPruned

        shown = (f"{key} {v:.4g}" if isinstance(v, float) else f"{key} {v}" for key, v in params.items())
        say(f"{_name(trial)}: {', '.join(shown)}")
        try:
            return search.run(_name(trial), params, validated)
        except TunesmithError as error:
            trial.set_user_attr("why", str(error))
            raise

    while True:
        taken = [t for t in study.get_trials(deepcopy=False) if not t.user_attrs.get("left")]
        if sum(t.state != TrialState.WAITING for t in taken) >= section.trials:
            return
        study.optimize(objective, n_trials=1, catch=(RecipeError, MachineError, *_trial_errors()))


def _trial_errors() -> tuple[type[TunesmithError], ...]:
    """What makes one trial fail and not the search."""
    from tunesmith.errors import DataError, ModelError, TrainingError

    return DataError, ModelError, TrainingError


def _suggest(trial: Any, key: str, values: Any) -> Any:
    if isinstance(values, list):
        return trial.suggest_categorical(key, values)
    if values.whole:
        return trial.suggest_int(key, int(values.low), int(values.high), log=values.logarithmic)
    return trial.suggest_float(key, values.low, values.high, log=values.logarithmic)


def _told(trial: Any) -> dict[str, Any]:
    last = trial.intermediate_values.get(trial.last_step) if trial.last_step is not None else None
    return {
        "trial": _name(trial),
        "state": trial.state.name.lower(),
        "value": trial.value if trial.value is not None else last,
        "settings": trial.params,
        "why": trial.user_attrs.get("why"),
    }
