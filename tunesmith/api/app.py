"""The application: one state, the routers by list, and what lies around every request."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from fastapi import Depends, FastAPI
from starlette.middleware.cors import CORSMiddleware

from tunesmith import __version__
from tunesmith.api import errors
from tunesmith.api.frame import Frame
from tunesmith.errors import TunesmithError
from tunesmith.serve.limits import Limits
from tunesmith.serve.section import ServeSection
from tunesmith.serve.serving import Serving
from tunesmith.serve.traffic import Traffic

# What `tunesmith serve` answers. The service adds its own.
SERVING = tuple(
    f"tunesmith.api.{name}" for name in ("health", "models", "chat", "completions", "embeddings", "feedback", "pages")
)
EXPOSED = ("x-request-id", "retry-after", "x-tunesmith-model", "x-tunesmith-cache", "x-tunesmith-guards")


@dataclass
class State:
    """What the routes share; `request.app.state.tunesmith`.

    Attributes:
        settings: the `serve:` section.
        serving: what answers; None for an application that only manages.
        keys: further keys that are let in, by the command line; with a store, those of the store come on top.
        store: the database, or None.
        service: the fine-tuning service's parts (jobs.service.Service), or None.
        registry: what keeps the served models in step with the database, or None.
        parts: what lives as long as the application: entered when it starts, left when it stops.
        local: whether only this machine can reach it, so that it needs no key.
        failure: why it could not start.
        stopping: it takes no new work, and says so to whoever asks whether it is ready.
    """

    settings: ServeSection = field(default_factory=ServeSection)
    serving: Serving | None = None
    keys: Sequence[str] = ()
    store: Any = None
    traffic: Traffic | None = None
    service: Any = None
    registry: Any = None
    parts: list[AbstractAsyncContextManager[Any]] = field(default_factory=list)
    local: bool = True
    failure: TunesmithError | None = None
    stopping: bool = False

    def __post_init__(self) -> None:
        self.limits = Limits(self.settings.limits)


def build(state: State, routers: Sequence[str] = SERVING) -> FastAPI:
    """The application over a state.

    Args:
        routers: modules that each have a `router`, and may have `largest(state)`: bytes of its largest body.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            try:
                for part in state.parts:
                    await stack.enter_async_context(part)
                if state.serving is not None:
                    await stack.enter_async_context(state.serving.models)
                    stack.push_async_callback(state.serving.close)
                if state.registry is not None:
                    await stack.enter_async_context(state.registry)
                if state.store is not None:
                    state.traffic = await stack.enter_async_context(Traffic(state.store, state.settings.traffic))
            except TunesmithError as error:
                state.failure = error
                raise
            yield
            state.stopping = True

    app = FastAPI(
        title="Tunesmith",
        version=__version__,
        description="OpenAI's API, on models of your own.",
        lifespan=lifespan,
        docs_url=None,  # those pages would fetch scripts from elsewhere; ours are in api/pages.py
        redoc_url=None,
        telemetry={"tracing": False},
    )
    app.state.tunesmith = state
    errors.install(app)
    if state.settings.cors:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(state.settings.cors),
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
        )
    app.add_middleware(Frame)
    whole = [Depends(errors.whole_letters)]
    for name in routers:
        module = import_module(name)
        most = module.largest(state) if hasattr(module, "largest") else state.settings.max_body
        app.router.include_router(module.router, max_body_size=most, dependencies=whole)
    return app
