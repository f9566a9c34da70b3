"""llama.cpp as a serving engine: its own server in a child process, asked through a socket.

What llama.cpp batches, it batches itself: every place ("slot") has its own keys and values, and rows join and leave
between steps. Which place a request takes is chosen here, by prompt and adapter. llama.cpp reads adapters when it loads
the model, so another adapter means another child: it takes over once it is ready, and the one before ends with its last
request. The model's pages are shared between the two.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from tunesmith.inference.child import Child
from tunesmith.inference.grammar import enforceable
from tunesmith.inference.hosted import Hosted
from tunesmith.inference.served import (
    EngineError,
    Finish,
    GrammarError,
    Piece,
    Request,
    TokenLogprob,
    TooLong,
    UnknownAdapter,
)
from tunesmith.inference.slots import Slots
from tunesmith.inference.sse import events, told_error
from tunesmith.models.arrays import adapter_config
from tunesmith.models.load import refuse_anothers
from tunesmith.models.resolve import ResolvedModel

HOST = "tunesmith.inference.llamacpp_host"
GONE = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.IncompleteReadError)


@dataclass(frozen=True)
class Settings:
    """How llama.cpp holds a model: what `llamacpp_host.py` is told.

    Attributes:
        model: a GGUF file, or a folder that one is made of, in `precision`.
        base: the model as a folder, which adapters are made for.
        context: tokens of each slot; keys and values take slots x context.
        draft: a smaller model (file or folder) that proposes up to `draft_tokens` at a time.
    """

    model: Path
    base: ResolvedModel
    precision: str
    context: int
    slots: int
    threads: int
    queue: int
    draft: Path | None = None
    draft_tokens: int = 8


class LlamaCppChild(Child):
    """A child that listens on a socket. `index` maps adapters to their numbers in it."""

    session: aiohttp.ClientSession
    places: Slots
    index: dict[str, int]

    async def end(self, patience: float = 5.0) -> None:
        if hasattr(self, "session"):
            await self.session.close()
        await super().end(patience)


class LlamaCppEngine(Hosted):
    kind = "llamacpp"

    def __init__(self, name: str, settings: Settings) -> None:
        super().__init__(name, settings.context, settings.slots, settings.queue)
        self._settings, self.precision = settings, settings.precision
        self._embedder: LlamaCppChild | None = None
        self._embedding = asyncio.Lock()

    async def close(self) -> None:
        await super().close()
        if self._embedder:
            await self._embedder.end()

    async def load_adapter(self, name: str, path: Path) -> None:
        if path.suffix != ".gguf":
            adapter_config(path)
        refuse_anothers(self._settings.base, path)
        there = {known: folder for known, folder in self._adapters.items() if folder.exists()}  # others may be deleted
        await self._with({**there, name: path})

    async def unload_adapter(self, name: str) -> None:
        self._named(name)
        await self._with({known: path for known, path in self._adapters.items() if known != name and path.exists()})

    async def embed(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        """The mean of the last layer's outputs over the prompt, of length 1."""
        for prompt in prompts:
            if len(prompt) > self.context:
                raise TooLong(len(prompt), self.context)
        async with self._embedding:
            if self._embedder is None or self._embedder.ended.done():
                self._embedder = await self._begin({}, embeddings=True)
            async with self._asked(self._embedder, "/v1/embeddings", {"input": list(prompts)}) as response:
                found = await response.json()
        return [row["embedding"] for row in sorted(found["data"], key=lambda row: row["index"])]

    async def _with(self, adapters: dict[str, Path]) -> None:
        async with self._changing:
            self._here()
            child = await self._launch(adapters)
            self._adapters = adapters
            self._adopt(child)

    async def _launch(self, adapters: dict[str, Path]) -> LlamaCppChild:
        return await self._begin(adapters, embeddings=False)

    async def _begin(self, adapters: dict[str, Path], embeddings: bool) -> LlamaCppChild:
        of = self._settings
        told = {
            "model": str(of.model),
            "base": str(of.base.path),
            "precision": of.precision,
            "context": of.context,
            "slots": of.slots,
            "threads": of.threads,
            "draft": str(of.draft) if of.draft and not embeddings else None,
            "draft_tokens": of.draft_tokens,
            "adapters": [str(path) for path in adapters.values()],
            "embeddings": embeddings,
        }
        child = await LlamaCppChild.start(HOST, told)
        connector = aiohttp.UnixConnector(child.ready["socket"], limit=0, force_close=True)
        child.session = aiohttp.ClientSession(
            "http://llama", connector=connector, timeout=aiohttp.ClientTimeout(), read_bufsize=2**20
        )
        child.places = Slots(of.slots)
        child.index = {name: number for number, name in enumerate(adapters)}
        return child

    async def _answer(self, child: Child, request: Request) -> AsyncGenerator[Piece, None]:
        assert isinstance(child, LlamaCppChild)
        if request.adapter is not None and request.adapter not in child.index:
            raise UnknownAdapter(f"no adapter is called '{request.adapter}'")
        place = child.places.take(request.adapter, request.prompt)
        held = list(request.prompt)
        try:
            async with self._asked(child, "/completion", self._body(child, request, place)) as response:
                found = _whole_answer if request.whole else _pieces
                async for piece in found(response, request, child):
                    held += piece.ids
                    yield piece
                    if piece.finish:
                        return
            raise self.down()  # the stream ended before the answer did
        except GONE as error:
            raise self.down() from error
        finally:
            child.places.give(place, request.adapter, held)

    def _body(self, child: LlamaCppChild, request: Request, place: int) -> dict[str, Any]:
        room = self.context - len(request.prompt)
        wanted = None if request.adapter is None else child.index[request.adapter]
        body: dict[str, Any] = {
            "prompt": request.prompt,
            "id_slot": place,
            "n_predict": min(request.max_new_tokens, room),
            "stream": not request.whole,
            "return_tokens": True,
            "samplers": ["penalties", "temperature", "top_p"],
            "temperature": request.temperature,
            "top_p": request.top_p,
            "top_k": 0,
            "repeat_last_n": self.context,
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "stop": list(request.stop),
            # Every adapter is named: one that is not would keep the scale of whoever had the place before.
            "lora": [{"id": i, "scale": float(i == wanted)} for i in child.index.values()],
        }
        if request.seed is not None:
            body["seed"] = request.seed % (2**32 - 1)  # llama.cpp draws anew for the greatest
        if request.logit_bias:
            body["logit_bias"] = [[token, bias] for token, bias in request.logit_bias.items()]
        if request.top_logprobs is not None:
            body["n_probs"] = max(1, request.top_logprobs)
        if request.grammar is not None:
            body["json_schema"] = enforceable(request.grammar)
        return body

    @asynccontextmanager
    async def _asked(self, child: LlamaCppChild, path: str, body: dict[str, Any]) -> Any:
        try:
            response = await child.session.post(path, json=body)
        except GONE as error:
            raise self.down() from error
        try:
            if response.status == 503:
                raise self.down()
            if response.status != 200:
                why = await told_error(response)
                raise (GrammarError if "grammar" in why.lower() else EngineError)(f"llama.cpp refused it: {why}")
            yield response
        finally:
            response.close()  # an answer that was not read to its end: llama.cpp sees it, and frees the slot


async def _whole_answer(response: aiohttp.ClientResponse, request: Request, child: LlamaCppChild) -> Any:
    event = await response.json()
    text, ids = event["content"], event["tokens"]
    if event["stop_type"] == "eos":
        ids = ids[:-1]
    end = next((place for place, token in enumerate(ids) if token in request.stop_ids), None)
    logprobs = _logprobs(event, request)[: len(ids) if end is None else end]
    if end is not None:  # one that llama.cpp does not know as an end
        ids = ids[:end]
        async with child.session.post("/detokenize", json={"tokens": ids}) as detokenized:
            text = (await detokenized.json())["content"]
    yield Piece(text, tuple(ids), logprobs, **_ending(event, "stop" if end is not None else None))


def _ending(event: dict[str, Any], finish: Finish | None = None) -> dict[str, Any]:
    """What the last piece says."""
    about = event["timings"]
    return {
        "finish": finish or ("length" if event["stop_type"] == "limit" else "stop"),
        "cached": about.get("cache_n", 0),
        "drafted": about.get("draft_n", 0),
        "accepted": about.get("draft_n_accepted", 0),
    }


async def _pieces(response: aiohttp.ClientResponse, request: Request, child: LlamaCppChild) -> Any:
    counted = 0
    quiet: list[Piece] = []  # without a text: the token that ends an answer is not a part of it
    async for event in events(response):
        if "error" in event:
            raise EngineError(f"llama.cpp gave up: {event['error'].get('message', event['error'])}")
        if event["stop"]:
            for piece in quiet[: -1 if event["stop_type"] == "eos" else None]:
                yield piece
            yield Piece(event["content"], **_ending(event))
            return
        ids, behind = event["tokens"], event["tokens_predicted"] - counted
        counted = event["tokens_predicted"]
        if behind > len(ids):  # tokens that held parts of a letter were not sent
            ids = await _parts(child, event["content"], behind, ids)
        if any(token in request.stop_ids for token in ids):
            yield Piece("", finish="stop")
            return
        quiet.append(Piece(event["content"], tuple(ids), _logprobs(event, request)))
        if event["content"]:
            for piece in quiet:
                yield piece
            quiet.clear()


async def _parts(child: LlamaCppChild, text: str, count: int, last: list[int]) -> list[int]:
    """The tokens of which a letter was made; llama.cpp's events tell only the last one."""
    async with child.session.post("/tokenize", json={"content": text, "add_special": False}) as response:
        found: list[int] = (await response.json())["tokens"]
    return found if len(found) == count and found[-1:] == last[-1:] else (last * count)[:count]


def _logprobs(event: dict[str, Any], request: Request) -> tuple[TokenLogprob, ...]:
    if request.top_logprobs is None:
        return ()
    return tuple(
        TokenLogprob(
            chosen["id"],
            # With a letter that took several tokens comes the last one's log-probability alone.
            bytes(chosen["bytes"]) if len(event["tokens"]) > 1 or _whole(chosen) else event["content"].encode(),
            chosen["logprob"],
            tuple(
                TokenLogprob(one["id"], bytes(one["bytes"]), one["logprob"])
                for one in chosen["top_logprobs"][: request.top_logprobs]
            ),
        )
        for chosen in event.get("completion_probabilities", ())
    )


def _whole(chosen: dict[str, Any]) -> bool:
    try:
        bytes(chosen["bytes"]).decode()
    except UnicodeDecodeError:
        return False
    return True
