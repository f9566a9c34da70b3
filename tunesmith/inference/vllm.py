"""vLLM as a serving engine: its server, started and watched, asked with token ids through /v1/completions; adapters are
loaded through its API while it serves. A server that runs elsewhere will do, too, where it takes prompts as ids."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp

from tunesmith.errors import ModelError
from tunesmith.inference.child import Child
from tunesmith.inference.engines import Vllm
from tunesmith.inference.grammar import enforceable
from tunesmith.inference.hosted import Hosted
from tunesmith.inference.letters import Words
from tunesmith.inference.served import EngineError, EngineFull, Piece, Request, TokenLogprob, Unserved
from tunesmith.inference.sse import events, told_error
from tunesmith.models.load import refuse_anothers
from tunesmith.models.resolve import ResolvedModel

if TYPE_CHECKING:
    from collections.abc import Callable

HOST = "tunesmith.inference.vllm_host"
BASE = "base"  # the name under which the model without an adapter answers
ADAPTER = "lora:"  # what the names of adapters begin with, since one may be called as the model is
LEAST = 1e-6  # top-p: vLLM refuses 0
PATIENCE = 900.0  # seconds for it to load a model
GONE = (aiohttp.ClientConnectionError, aiohttp.ClientPayloadError, asyncio.IncompleteReadError)


class VllmChild(Child):
    session: aiohttp.ClientSession

    async def end(self, patience: float = 15.0) -> None:
        if hasattr(self, "session"):
            await self.session.close()
        await super().end(patience)


class VllmEngine(Hosted):
    kind = "vllm"

    def __init__(self, name: str, model: ResolvedModel, section: Vllm) -> None:
        super().__init__(name, section.tokens(model), section.slots, section.queue)
        self._section, self._model = section, model
        self._served = section.model if section.url and section.model else BASE

    async def load_adapter(self, name: str, path: Path) -> None:
        refuse_anothers(self._model, path)
        async with self._changing:
            await self._load(self._child_here(), name, path)
            self._adapters[name] = path

    async def unload_adapter(self, name: str) -> None:
        self._named(name)
        async with self._changing:
            del self._adapters[name]
            async with self._asked(self._child_here(), "/v1/unload_lora_adapter", {"lora_name": ADAPTER + name}):
                pass

    async def embed(self, prompts: Sequence[list[int]]) -> list[list[float]]:
        raise Unserved(
            "vLLM serves a model either for answers or for embeddings, and this one is served for answers",
            fix="Serve an embedding model beside it, or take engine: llamacpp or transformers.",
        )

    def _child_here(self) -> VllmChild:
        child = self._here()
        assert isinstance(child, VllmChild)
        return child

    async def _launch(self, adapters: dict[str, Path]) -> VllmChild:
        of = self._section
        arguments = [
            *("--served-model-name", BASE),
            *("--max-model-len", str(self.context)),
            *("--max-num-seqs", str(self.slots)),
            *("--enable-lora", "--max-loras", str(of.max_loras), "--max-lora-rank", str(of.max_lora_rank)),
            *(("--trust-remote-code",) if self._model.trust_remote_code else ()),
            *("--generation-config", "vllm"),  # no defaults for drawing from the model's folder
            *of.arguments,
        ]
        told = {
            "url": of.url,
            "command": [*of.command, str(self._model.path)],
            "arguments": arguments,
            "patience": PATIENCE,
        }
        child = await VllmChild.start(HOST, told)
        child.session = aiohttp.ClientSession(
            child.ready["url"],
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(),
            read_bufsize=2**20,
        )
        try:
            for name, path in adapters.items():
                await self._load(child, name, path)
        except BaseException:
            await child.end()
            raise
        return child

    async def _load(self, child: VllmChild, name: str, path: Path) -> None:
        body = {"lora_name": ADAPTER + name, "lora_path": str(path.resolve())}
        try:
            async with self._asked(child, "/v1/load_lora_adapter", body):
                pass
        except EngineError as error:
            raise ModelError(
                f"vLLM can't load it: {error.what}", where=str(path), fix="See docs/engines.md."
            ) from error

    async def _answer(self, child: Child, request: Request) -> AsyncGenerator[Piece, None]:
        assert isinstance(child, VllmChild)
        cached, finish = 0, None
        try:
            async with self._asked(child, "/v1/completions", self._body(request)) as response:
                async for event in events(response):
                    if "error" in event:
                        raise EngineError(f"vLLM gave up: {event['error'].get('message', event['error'])}")
                    if event.get("usage"):
                        cached = (event["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                    for choice in event["choices"]:
                        finish = choice.get("finish_reason") or finish
                        ids = [i for i in choice.get("token_ids") or () if i not in request.stop_ids]
                        yield Piece(choice["text"], tuple(ids), self._logprobs(choice, request))
        except GONE as error:
            raise self.down() from error
        if finish is None:
            raise self.down()
        yield Piece("", finish="length" if finish == "length" else "stop", cached=cached)

    def _body(self, request: Request) -> dict[str, Any]:
        room = self.context - len(request.prompt)
        body: dict[str, Any] = {
            "model": self._served if request.adapter is None else ADAPTER + request.adapter,
            "prompt": request.prompt,
            "max_tokens": min(request.max_new_tokens, room),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "temperature": request.temperature,
            "top_p": max(request.top_p, LEAST),
            "presence_penalty": request.presence_penalty,
            "frequency_penalty": request.frequency_penalty,
            "stop": list(request.stop),
            "stop_token_ids": list(request.stop_ids),
        }
        if request.seed is not None:
            body["seed"] = request.seed % 2**63  # vLLM draws anew for -1
        if request.logit_bias:
            body["logit_bias"] = {str(token): bias for token, bias in request.logit_bias.items()}
        if request.top_logprobs is not None:
            body["logprobs"] = request.top_logprobs
        if request.grammar is not None:
            schema = enforceable(request.grammar)
            body["structured_outputs"] = {"json": {key: schema[key] for key in schema if key != "x-guidance"}}
        return body

    def _logprobs(self, choice: Mapping[str, Any], request: Request) -> tuple[TokenLogprob, ...]:
        told = choice.get("logprobs")
        if request.top_logprobs is None or not told:
            return ()
        tops = told.get("top_logprobs") or [None] * len(told["tokens"])
        return tuple(
            TokenLogprob(
                token.id,
                token.data,
                token.logprob,
                tuple(self._token(name, value) for name, value in (top or {}).items())[: request.top_logprobs],
            )
            for token, top in zip(map(self._token, told["tokens"], told["token_logprobs"]), tops, strict=True)
            if token.id not in request.stop_ids
        )

    def _token(self, name: str, logprob: float) -> TokenLogprob:
        token = int(name.removeprefix("token_id:"))
        return TokenLogprob(token, self._word(token), logprob)

    @property
    def _word(self) -> Callable[[int], bytes]:
        if not hasattr(self, "_words"):
            from tokenizers import Tokenizer

            self._words = Words(Tokenizer.from_file(str(self._model.path / "tokenizer.json")))
        return self._words.data

    @asynccontextmanager
    async def _asked(self, child: VllmChild, path: str, body: dict[str, Any]) -> AsyncIterator[aiohttp.ClientResponse]:
        try:
            response = await child.session.post(path, json=body)
        except GONE as error:
            raise self.down() from error
        try:
            if response.status == 429:
                raise EngineFull(f"vLLM has no room for '{self.name}' now", fix="Ask again a little later.")
            if response.status >= 502:
                raise self.down()
            if response.status != 200:
                raise EngineError(f"vLLM refused it: {await told_error(response)}")
            yield response
        finally:
            response.close()
