"""What is served: names, and the engine, adapter and renderer behind each. Names come and go while others answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.errors import nearest
from tunesmith.inference.served import Health
from tunesmith.models.resolve import folder_hash
from tunesmith.serve.asked import Refused

if TYPE_CHECKING:
    from tunesmith.conversation.render import Renderer
    from tunesmith.inference.served import ServingEngine


@dataclass(frozen=True)
class Served:
    """A model that answers under a name.

    Attributes:
        adapter: its name in the engine; None for the engine's model as it is.
        system: the system message it was trained under, for conversations that bring none.
        root: where it lies.
        parent: the name of its base, where that is served too.
        identity: changes with the weights, and with nothing else.
        projects: who alone may ask it; None for everybody.
    """

    name: str
    engine: ServingEngine
    renderer: Renderer
    adapter: str | None = None
    system: str | None = None
    root: str = ""
    parent: str | None = None
    identity: str = ""
    projects: frozenset[str] | None = None
    owned_by: str = "tunesmith"
    created: int = field(default_factory=lambda: int(time.time()))

    def visible(self, project: str | None) -> bool:
        """Whether a project may ask it."""
        return self.projects is None or project in self.projects

    def as_dict(self) -> dict[str, Any]:
        """As `/v1/models` lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": self.owned_by,
            "root": self.root or self.name,
            "parent": self.parent,
            "max_model_len": self.engine.context,
        }


class Models:
    """The models of a server. Entered, its engines start; left, they end."""

    def __init__(self) -> None:
        self._served: dict[str, Served] = {}
        self._later: list[tuple[str, str, Path, dict[str, Any]]] = []
        self._soon: dict[str, Served] = {}
        self._started: dict[int, ServingEngine] = {}  # kept, so that no other one gets its id
        self._changing = asyncio.Lock()

    def __iter__(self) -> Iterator[Served]:
        return iter(list(self._served.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._served

    @property
    def engines(self) -> list[ServingEngine]:
        """Each engine once."""
        return list({id(s.engine): s.engine for s in self._served.values()}.values())

    def get(self, name: str, project: str | None = None) -> Served:
        """A model by its name.

        Raises:
            Refused: there is none, or it is another project's.
        """
        found = self._served.get(name)
        if found is None or not found.visible(project):
            raise unknown(name, [s.name for s in self if s.visible(project)])
        return found

    def put(self, served: Served) -> None:
        """Have a model answer under its name from now on. Its engine must be started, or is when this is entered."""
        self._served[served.name] = served

    def soon(self, served: Served) -> None:
        """As `put`, once its engine has started, by `begin`."""
        self._soon[served.name] = served

    def holds(self, served: Served) -> bool:
        """Whether a model's engine answers for any name, or is about to."""
        return any(s.engine is served.engine for s in (*self._served.values(), *self._soon.values()))

    def taken(self, name: str) -> bool:
        """Whether a name is a model's, or is about to be."""
        return name in self._served or name in self._soon or any(name == later for later, *_ in self._later)

    def later(self, name: str, base: str, adapter: Path, **about: Any) -> None:
        """As `add`, once the engines have started."""
        self._later.append((name, base, adapter, about))

    async def add(
        self,
        name: str,
        base: str,
        adapter: Path,
        *,
        system: str | None = None,
        renderer: Renderer | None = None,
        projects: frozenset[str] | None = None,
        identity: str | None = None,
        owned_by: str = "tunesmith",
    ) -> Served:
        """Load an adapter (a LoRA folder) onto the base of a model that is served, and have it answer under a name.

        Raises:
            Refused: no such base, or the name is taken.
            ModelError: the folder is no adapter of that base.
        """
        async with self._changing:
            on = self._served.get(base)
            if on is None:
                raise unknown(base, self._served)
            if name in self._served:
                raise Refused(f"There is a model '{name}' already.", code="model_exists", param="lora_name")
            await on.engine.load_adapter(name, adapter)
            parent = base if on.adapter is None else on.parent
            served = replace(
                on,
                name=name,
                adapter=name,
                system=system,
                renderer=renderer or on.renderer,
                root=str(adapter),
                parent=parent,
                identity=identity or f"{on.identity}:{await asyncio.to_thread(folder_hash, adapter)}",
                projects=projects,
                owned_by=owned_by,
                created=int(time.time()),
            )
            self._served[name] = served
            return served

    async def host(self, served: Served) -> None:
        """Start a model's own engine, while others are changed, and have it answer.

        Raises:
            Refused: the name is taken.
            TunesmithError: the engine does not start.
        """
        if self.taken(served.name):
            raise Refused(f"There is a model '{served.name}' already.", code="model_exists")
        try:
            await served.engine.start()
        except BaseException:
            await served.engine.close()
            raise
        self._started[id(served.engine)] = served.engine
        self._served[served.name] = served

    def share(self, name: str, projects: frozenset[str] | None) -> None:
        """Say anew who may ask a model."""
        self._served[name] = replace(self._served[name], projects=projects)

    async def remove(self, name: str) -> Served:
        """Have a name answer no more. Requests that use it end first; an engine that no name needs any more ends too.

        Raises:
            Refused: there is none of that name.
        """
        async with self._changing:
            served = self._served.pop(name, None)
            if served is None:
                raise unknown(name, self._served)
            if served.engine not in self.engines:
                self._started.pop(id(served.engine), None)
                await served.engine.close()
            elif served.adapter is not None and served.adapter in served.engine.adapters():
                await served.engine.unload_adapter(served.adapter)
            return served

    def health(self) -> dict[str, Health]:
        """What can be expected of each engine."""
        return {engine.name: engine.health() for engine in self.engines}

    async def __aenter__(self) -> Models:
        try:
            await self.begin()
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def begin(self) -> None:
        """Start the engines that have not started, and load the adapters that wait for them.

        Raises:
            TunesmithError: one can't; what it should have answered for is not there then.
        """
        soon, self._soon = self._soon, {}
        every = {id(s.engine): s.engine for s in (*self._served.values(), *soon.values())}
        engines = [engine for engine in every.values() if id(engine) not in self._started]
        self._started |= {id(engine): engine for engine in engines}
        results = await asyncio.gather(*(e.start() for e in engines), return_exceptions=True)
        for engine, error in zip(engines, results, strict=True):
            if isinstance(error, BaseException):
                self._served = {name: s for name, s in self._served.items() if s.engine is not engine}
                soon = {name: s for name, s in soon.items() if s.engine is not engine}
                self._started.pop(id(engine), None)
                await engine.close()
        self._served |= soon
        wrong = [error for error in results if isinstance(error, BaseException)]
        if wrong:
            self._later.clear()
            raise wrong[0]
        while self._later:
            name, base, adapter, about = self._later.pop(0)
            await self.add(name, base, adapter, **about)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*(engine.close() for engine in self.engines), return_exceptions=True)


def unknown(name: str, known: Any) -> Refused:
    near = nearest(name[:200], known)
    return Refused(
        f"The model '{name[:200]}' does not exist or you do not have access to it{near or '.'}",
        status=404,
        code="model_not_found",
        param="model",
    )
