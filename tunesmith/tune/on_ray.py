"""The same search on a Ray cluster, with Ray Tune: each trial is a task; the median rule stops the worst."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any

from tunesmith.errors import MachineError, TunesmithError, first_line

if TYPE_CHECKING:
    from tunesmith.tune.search import Search

VALUE = "value"


def search_on_ray(search: Search) -> dict[str, Any]:
    """Search, going on from what an earlier search of this folder left.

    Raises:
        MachineError: Ray did not start.
        TunesmithError: no trial came through.
    """
    import ray

    started = not ray.is_initialized()
    if started:
        _start()
    try:
        with contextlib.redirect_stdout(sys.stderr):  # Ray prints tables, also where it is asked not to
            results = _tuner(search, _trial(search)).fit()
    finally:
        if started:
            ray.shutdown()
    trials = [_told(result) for result in results]
    if not any(trial["state"] == "complete" for trial in trials):
        why = next((trial["why"] for trial in trials if trial["why"]), "they were stopped")
        raise TunesmithError(f"no trial came through: {why}", where=str(search.folder), fix="Look at tune.space.")
    best = results.get_best_result(VALUE, _mode(search), scope="all")
    value, config = best.metrics[VALUE], best.config or {}
    return {
        "best": {"settings": config, "value": value, "trial": _name(best)},
        "recipe": str(search.keep_best(config)),
        "metric": search.recipe["train"]["best_by"],
        "trials": trials,
    }


def _start() -> None:
    """A cluster on this machine."""
    import ray

    try:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    except Exception as error:  # plain ones, of many kinds
        raise MachineError(
            f"Ray did not start ({first_line(error)})",
            where="tune.engine",
            fix="Try again when the machine is less busy, or take tune.engine: optuna.",
        ) from error


def _trial(search: Search) -> Any:
    """A training with some settings, as Ray's task with its share of the cores."""
    import ray
    from ray import tune

    cores = max(1, int(ray.cluster_resources().get("CPU", 1)) // search.section.workers)

    def trainable(settings: dict[str, Any]) -> None:
        import torch

        torch.set_num_threads(cores)
        last = [0]

        def validated(step: int, value: float) -> None:
            last[0] = step
            tune.report({VALUE: value, "step": step})

        # A trial that is taken up again keeps its id, so its run goes on.
        value = search.run(f"trial-{tune.get_context().get_trial_id()}", settings, validated)
        tune.report({VALUE: value, "step": last[0] + 1})

    return tune.with_resources(trainable, {"cpu": cores})


def _tuner(search: Search, trial: Any) -> Any:
    """Ray's search, or what is left of the one that began in this folder."""
    from ray import tune

    place, section = (search.folder / "ray").resolve(), search.section
    if tune.Tuner.can_restore(str(place / "search")):
        return tune.Tuner.restore(str(place / "search"), trial, resume_unfinished=True, restart_errored=False)
    scheduler = tune.schedulers.MedianStoppingRule(
        time_attr="step", grace_period=1, min_samples_required=max(section.try_first, 1)
    )
    return tune.Tuner(
        trial,
        param_space={key: _domain(tune, values) for key, values in section.space.items()},
        tune_config=tune.TuneConfig(
            metric=VALUE,
            mode=_mode(search),
            num_samples=section.trials,
            max_concurrent_trials=section.workers,
            scheduler=scheduler if section.pruning else None,
        ),
        run_config=tune.RunConfig(name="search", storage_path=str(place), verbose=0),
    )


def _mode(search: Search) -> str:
    return "max" if search.maximize else "min"


def _name(result: Any) -> str:
    return f"trial-{(result.metrics or {}).get('trial_id', 'unknown')}"


def _domain(tune: Any, values: Any) -> Any:
    if isinstance(values, list):
        return tune.choice(values)
    if values.whole:
        draw = tune.lograndint if values.logarithmic else tune.randint
        return draw(int(values.low), int(values.high) + 1)
    return (tune.loguniform if values.logarithmic else tune.uniform)(values.low, values.high)


def _told(result: Any) -> dict[str, Any]:
    return {
        "trial": _name(result),
        "state": "fail" if result.error else "complete",
        "value": (result.metrics or {}).get(VALUE),
        "settings": result.config,
        "why": first_line(result.error) if result.error else None,
    }
