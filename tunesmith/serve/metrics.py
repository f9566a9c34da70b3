"""What Prometheus is told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from tunesmith.errors import MachineError

TO_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
WHOLE = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Counters and histograms of one server, by model and route."""

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError as error:
            raise MachineError(
                f"needs {error.name}, which is not installed", where="serve", fix="pip install 'tunesmith[serve]'"
            ) from error
        self.registry = registry = CollectorRegistry()
        by = ("model", "route")

        def counter(name: str, says: str, labels: Iterable[str] = by) -> Any:
            return Counter(f"tunesmith_{name}", says, tuple(labels), registry=registry)

        def histogram(name: str, says: str, buckets: Iterable[float]) -> Any:
            return Histogram(f"tunesmith_{name}", says, by, buckets=tuple(buckets), registry=registry)

        self.requests = counter("requests", "Requests, by how they ended.", (*by, "status"))
        self.prompt_tokens = counter("prompt_tokens", "Tokens that were asked.")
        self.cached_tokens = counter("cached_tokens", "Tokens that were asked and found in the prefix cache.")
        self.completion_tokens = counter("completion_tokens", "Tokens that were answered.")
        self.drafted = counter("drafted_tokens", "Tokens that a draft model proposed.")
        self.accepted = counter("accepted_tokens", "Tokens that a draft model proposed and that were taken.")
        self.cache_hits = counter("cache_hits", "Requests that were answered from the response cache.")
        self.cache_misses = counter("cache_misses", "Requests that could have been, and were not.")
        self.guards = counter("guard_hits", "What guards found.", ("guard", "action", "side"))
        self.fallbacks = counter("fallbacks", "Requests that another model answered, since the first one failed.")
        self.shadows = counter("shadow_requests", "Requests that were asked again of a model in the shadow.")
        self.first = histogram("time_to_first_token_seconds", "From the request to the first token.", TO_FIRST)
        self.token = histogram("time_per_token_seconds", "From one token to the next, on average.", PER_TOKEN)
        self.seconds = histogram("request_seconds", "From the request to the last token.", WHOLE)
        self._running = Gauge("tunesmith_running", "Requests that are being answered.", by, registry=registry)
        self._waiting = Gauge("tunesmith_waiting", "Requests that wait for a slot.", ("engine",), registry=registry)
        self._up = Gauge("tunesmith_engine_up", "1 where the engine is ready.", ("engine",), registry=registry)
        self._restarts = Gauge(
            "tunesmith_engine_restarts", "Times it was started again.", ("engine",), registry=registry
        )

    def running(self, model: str, route: str, change: int) -> None:
        self._running.labels(model, route).inc(change)

    def text(self, engines: Iterable[Any]) -> bytes:
        """All of it, in Prometheus' format."""
        from prometheus_client import generate_latest

        for engine in engines:
            self._up.labels(engine.name).set(engine.health() == "ready")
            self._waiting.labels(engine.name).set(getattr(engine, "waiting", 0))
            self._restarts.labels(engine.name).set(getattr(engine, "restarts", 0))
        found: bytes = generate_latest(self.registry)
        return found
