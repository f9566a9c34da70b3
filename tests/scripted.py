"""An engine that says what a test wants, and a server of the real application on a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import uvicorn
from starlette.testclient import TestClient

from tests.conftest import make_tokenizer
from tunesmith.api.app import State, build
from tunesmith.conversation.render import Renderer
from tunesmith.errors import ModelError
from tunesmith.inference.served import EngineFull, Finish, Health, Piece, Request, TokenLogprob, UnknownAdapter
from tunesmith.serve.models import Models, Served
from tunesmith.serve.section import ServeSection
from tunesmith.serve.serving import Serving

HERMES = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}\n{{ t.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HI = [{"role": "user", "content": "What colour is it?"}]


@dataclass
class Scripted:
    """An engine whose answers a function gives; token by token, `pause` seconds apart.

    `running` is how many slots are taken now; `fail` may raise what an engine would.
    """

    renderer: Renderer
    reply: Callable[[Request], str]
    name: str = "scripted"
    kind: str = "scripted"
    precision: str | None = None
    context: int = 512
    slots: int = 4
    queue: int = 8
    pause: float = 0.0
    fail: Callable[[Request, int], None] = lambda request, token: None
    drafted: int = 0
    accepted: int = 0
    asked: list[Request] = field(default_factory=list)
    running: int = 0
    waiting: int = 0
    loaded: dict[str, Path] = field(default_factory=dict)
    state: Health = "starting"

    async def start(self) -> None:
        self.state, self._free = "ready", asyncio.Semaphore(self.slots)

    async def close(self) -> None:
        self.state = "failed"

    def health(self) -> Health:
        return self.state

    def adapters(self) -> list[str]:
        return list(self.loaded)

    async def load_adapter(self, name: str, path: Path) -> None:
        if not (path / "adapter_model.safetensors").is_file():
            raise ModelError("holds no adapter", where=str(path))
        self.loaded[name] = path

    async def unload_adapter(self, name: str) -> None:
        if name not in self.loaded:
            raise UnknownAdapter(f"no adapter is called '{name}'")
        del self.loaded[name]

    async def embed(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        return [[1.0 * (i == len(p) % 4) for i in range(4)] for p in prompts]

    async def stream(self, request: Request) -> AsyncGenerator[Piece, None]:
        self.asked.append(request)
        if request.adapter is not None and request.adapter not in self.loaded:
            raise UnknownAdapter(f"no adapter is called '{request.adapter}'")
        if self.waiting >= self.queue and self._free.locked():
            raise EngineFull("as many requests wait as may", retry_after=3)
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            if request.echo:
                first, *rest = [self._logprobs(request, token)[0] for token in request.prompt]
                yield Piece("", prompt=(replace(first, logprob=float("nan"), top=()), *rest))
            text = self.reply(request)
            ends = [text.find(s) for s in request.stop if s in text]
            ids = self.renderer.continued(text[: min(ends)] if ends else text)
            for number, token in enumerate(ids[: request.max_new_tokens]):
                self.fail(request, number)
                await asyncio.sleep(self.pause)
                said = self.renderer.tokenizer.decode([token])
                yield Piece(said, (token,), self._logprobs(request, token))
            self.fail(request, len(ids))
            finish: Finish = "length" if len(ids) > request.max_new_tokens else "stop"
            yield Piece("", finish=finish, cached=2, drafted=self.drafted, accepted=self.accepted)
        finally:
            self.running -= 1
            self._free.release()

    def _logprobs(self, request: Request, token: int) -> tuple[TokenLogprob, ...]:
        if request.top_logprobs is None:
            return ()
        data = self.renderer.tokenizer.decode([token]).encode()
        top = tuple(TokenLogprob(token + i, data, -0.5 - i) for i in range(request.top_logprobs))
        return (TokenLogprob(token, data, -0.5, top),)


def figures(http: TestClient) -> dict[str, float]:
    """What /metrics has, by its own notation: 'tunesmith_waiting{engine="scripted"}'; labels by the alphabet."""
    lines = http.get("/metrics").text.splitlines()
    return {name: float(value) for name, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}


def asked_text(engine: Scripted, number: int = -1) -> str:
    """What a prompt was, as text."""
    return engine.renderer.tokenizer.decode(engine.asked[number].prompt)


def scripted(
    reply: Callable[[Request], str] | str = "Blue it is.", template: str | None = None, **more: Any
) -> Scripted:
    renderer = Renderer(make_tokenizer(template) if template else make_tokenizer())
    return Scripted(renderer, reply if callable(reply) else lambda _: reply, **more)


def state_of(
    *engines: Scripted, keys: Sequence[str] = (), store: Any = None, routes: Any = None, **settings: Any
) -> State:
    """An application's state over engines, each serving a model of its name."""
    section = ServeSection(**settings)
    models = Models()
    for engine in engines:
        models.put(Served(engine.name, engine, engine.renderer, identity=engine.name))
    return State(section, Serving(section, models, routes), keys=keys, store=store)


def served(*engines: Scripted, **settings: Any) -> TestClient:
    """A client of an application over engines."""
    return TestClient(build(state_of(*engines, **settings)))


def ask(http: TestClient, text: str = "What colour is it?", model: str = "scripted", **more: Any) -> Any:
    """The response to a chat of one message; `more` are further keys of the request."""
    messages = [{"role": "user", "content": text}]
    return http.post("/v1/chat/completions", json={"model": model, "messages": messages} | more)


def said(response: Any) -> str:
    """The text of an answer, which must be one."""
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


def streamed(http: TestClient, **more: Any) -> tuple[str, str]:
    """The text of a streamed answer and how it ended."""
    body = {"model": "scripted", "messages": HI, "stream": True} | more
    text, finish = "", ""
    for line in http.post("/v1/chat/completions", json=body).text.splitlines():
        if line.startswith("data: {"):
            choice = json.loads(line[6:])["choices"][0]
            text, finish = text + (choice["delta"].get("content") or ""), choice["finish_reason"] or finish
    return text, finish


LAST: uvicorn.Server  # the server that was started last


@contextlib.contextmanager
def running(state: State, **server: Any) -> Iterator[str]:
    """The real server over a state; gives its address."""
    config = uvicorn.Config(build(state), port=0, log_level="warning", lifespan="on", log_config=None, **server)
    global LAST
    LAST = instance = uvicorn.Server(config)
    thread = threading.Thread(target=instance.run, daemon=True)
    thread.start()
    while not instance.started:
        assert thread.is_alive(), "the server did not start"
        threading.Event().wait(0.01)
    try:
        scheme = "https" if server.get("ssl_certfile") else "http"
        yield f"{scheme}://127.0.0.1:{instance.servers[0].sockets[0].getsockname()[1]}"
    finally:
        instance.should_exit = True
        thread.join(120)
        assert not thread.is_alive(), "the server did not stop"
