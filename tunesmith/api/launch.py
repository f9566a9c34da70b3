"""`tunesmith serve`: targets to models, models to a server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith import runs as run_folders
from tunesmith.errors import Held, MachineError, ModelError, RunError
from tunesmith.progress import say

try:
    from tunesmith.api.app import State
    from tunesmith.api.server import Place, serve
except ImportError as error:
    raise MachineError(
        f"serving needs {error.name}, which is not installed", fix="pip install 'tunesmith[serve]'"
    ) from error
from tunesmith.api.opening import Opening, settings_of
from tunesmith.serve.remote import is_endpoint
from tunesmith.serve.routes import forced, named, read
from tunesmith.serve.serving import Serving


def launch(
    targets: Sequence[str],
    adapters: Sequence[str],
    sets: Sequence[str],
    keys: Sequence[str],
    *,
    place: Place,
    base: str | None,
    database: str | None,
    routes: Path,
    force: bool,
    runs: Path | None,
) -> None:
    """Serve until told to stop.

    Raises:
        TunesmithError: a target is not there, is held by its gate, or can't be served.
    """
    settings = settings_of(targets, sets, runs)
    opening = Opening(settings, runs, force, base)
    names = [opening.open(target) for target in targets]
    for given in adapters:
        name, mark, folder = given.partition("=")
        if not mark:
            raise RunError("names no adapter", where=f"--adapter {given}", fix="Write --adapter NAME=FOLDER.")
        names.append(opening.adapter(name, Path(folder).expanduser()))
    for name in named(dict(settings.routes) | read(routes)):
        if name not in names and not opening.models.taken(name) and not is_endpoint(name):
            try:
                names.append(opening.open(name, name in forced(routes)))
            except (ModelError, RunError) as error:  # it was deleted since, say
                raise RunError(
                    f"a route goes to '{name}', which can't be served: {error.what}",
                    where=str(routes),
                    fix="Promote another version (tunesmith promote), go back (tunesmith rollback), or bring it back.",
                ) from error
    store = None
    if database:
        from tunesmith import store as stores

        store = stores.open(database)
    serving = Serving(settings, opening.models, routes)
    serving.fetch = opening.fetch
    state = State(settings, serving, keys=tuple(keys), store=store)
    serve(state, place, ready=lambda url: say(f"Serving {', '.join(names)} at {url} (Ctrl+C stops)"))


def held_by_gate(name: str, runs: Path | None) -> Held | None:
    """Why the gate holds a run; None where it does not, or where the name is no run's."""
    from tunesmith import recipe as recipes
    from tunesmith.journey import Journey

    try:
        run = run_folders.get(name, runs)
    except RunError:
        return None
    recipe, folder = recipes.load(run.recipe)
    return Journey(recipe, folder, run).held()
