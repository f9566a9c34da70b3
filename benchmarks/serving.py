"""Serving: tokens per second alone and at 8 and 32 at once, and the time to the first token, of each engine beside
llama.cpp's own server, `transformers serve` (in an environment of its own; transformers-serve-cb has it batch
continuously) and transformers' generate, with the same model on the same cores; ten adapters beside one.

    python benchmarks/serving.py [--engines llamacpp,transformers,llama-server,transformers-serve,generate]
        [--at-once 1,8,32] [--rounds 5] [--precision q8_0] [--adapters 10] [--json FILE]

NEW_TOKENS (64) and QUESTIONS (32) in the environment make it shorter; --adapters 0 leaves adapters out. A round asks
each contender once, so that a machine's good and bad minutes fall on all; figures are medians over the rounds, also of
the round's ratios (ours by llama.cpp's own server and by generate alone; ten adapters by one).

A contender is a context manager that gives `ask(prompt, adapter) -> (seconds to the first token, tokens)`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from environments import HERE, peers_environment, python_of

from tunesmith.conversation.message import Message
from tunesmith.inference.engines import LlamaCpp, Transformers
from tunesmith.inference.served import Request
from tunesmith.models.resolve import ResolvedModel, resolve
from tunesmith.models.section import ModelSection

MODEL, CONTEXT = "smollm2-135m-instruct", 512
NEW_TOKENS = int(os.environ.get("NEW_TOKENS", "64"))
QUESTIONS = int(os.environ.get("QUESTIONS", "32"))
SERVE_PINS = (
    "transformers[serving]==5.23.0",
    "accelerate==1.15.0",
    "fastapi==0.165.0",
    "uvicorn==0.54.0",
    "openai==3.54.0",
)
SERVE = "import sys, tiles; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
OURS = ("llamacpp", "transformers")
Ask = Callable[[list[int], str | None], Awaitable[tuple[float, int]]]
OWN_SERVER = """
import sys, xllamacpp
p = xllamacpp.CommonParams()
p.model.path, slots, p.hostnames = sys.argv[1], int(sys.argv[2]), [sys.argv[3]]
p.n_parallel, p.n_ctx, p.verbosity, p.ui, p.fit_params = slots, slots * int(sys.argv[4]), 2, False, False
p.cpuparams.n_threads = p.cpuparams_batch.n_threads = int(sys.argv[5])
server = xllamacpp.Server(p)
print("ready", flush=True)
sys.stdin.read()
"""


def prompts(model: ResolvedModel) -> list[list[int]]:
    """Questions of about 60 tokens that begin alike, as the renderer writes them."""
    from tunesmith.models.load import load_renderer

    renderer = load_renderer(model)
    told = "You answer questions about a shop's orders in two or three short sentences, and never invent a number."
    return [
        renderer.prompt((Message("system", told), Message("user", f"Order {i} has not come. Who do I ask, and when?")))
        for i in range(QUESTIONS)
    ]


@contextlib.asynccontextmanager
async def engine(kind: str, model: ResolvedModel, slots: int, adapters: dict[str, Path], precision: str) -> Any:
    """One of ours."""
    told: dict[str, Any] = {"slots": slots, "context": CONTEXT, "queue": 1000}
    section = LlamaCpp(precision=precision, **told) if kind == "llamacpp" else Transformers(**told)  # type: ignore[arg-type]
    serving = section.build(MODEL, model)
    await serving.start()

    async def ask(prompt: list[int], adapter: str | None) -> tuple[float, int]:
        began, first, count = time.perf_counter(), 0.0, 0
        async for piece in serving.stream(Request(prompt, NEW_TOKENS, (0, 2), adapter=adapter)):
            first = first or time.perf_counter() - began
            count += len(piece.ids)
        return first, count

    try:
        for name, path in adapters.items():
            await serving.load_adapter(name, path)
        yield ask
    finally:
        await serving.close()


@contextlib.asynccontextmanager
async def llama_server(model: ResolvedModel, slots: int, precision: str) -> AsyncIterator[Ask]:
    """llama.cpp's own server in a bare process, asked over its socket."""
    import aiohttp

    from tunesmith.inference.sse import events
    from tunesmith.models.gguf_file import model_gguf

    file = model_gguf(model.path, precision)
    with tempfile.TemporaryDirectory() as folder:
        place = f"{folder}/own.sock"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", OWN_SERVER, str(file), str(slots), place, str(CONTEXT), str(os.cpu_count())),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
        assert process.stdout
        while b"ready" not in await process.stdout.readline():
            pass
        connector = aiohttp.UnixConnector(place, limit=0, force_close=True)
        async with aiohttp.ClientSession("http://x", connector=connector) as session:

            async def ask(prompt: list[int], adapter: str | None) -> tuple[float, int]:
                began, first, count = time.perf_counter(), 0.0, 0
                body = {"prompt": prompt, "n_predict": NEW_TOKENS, "stream": True, "temperature": 0}
                async with session.post("/completion", json=body) as response:
                    async for event in events(response):
                        first = first or time.perf_counter() - began
                        count = max(count, event["tokens_predicted"])
                return first, count - (event["stop_type"] == "eos")  # what ends an answer is no part of it

            try:
                yield ask
            finally:
                process.kill()
                await process.wait()


@contextlib.asynccontextmanager
async def transformers_serve(model: ResolvedModel, batching: bool) -> AsyncIterator[Ask]:
    """`transformers serve`, streaming completions of the same texts, in the precision that is quicker here."""
    import aiohttp
    from transformers import AutoTokenizer

    from tunesmith.inference.sse import events
    from tunesmith.models.machine import machine

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    tokenizer = AutoTokenizer.from_pretrained(model.path)
    told = ["--device", "cpu", "--dtype", machine().precision, "--host", "127.0.0.1", "--port", str(port)]
    told += ["--continuous-batching"] if batching else []
    process = await asyncio.create_subprocess_exec(
        *(python_of("transformers-serve", SERVE_PINS), "-c", SERVE, "serve", str(model.path), *told),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        env=peers_environment() | {"PYTHONPATH": str(HERE / "peers")},
    )
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    patience = aiohttp.ClientTimeout(total=None)
    try:
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", connector=connector, timeout=patience) as session:

            async def is_there() -> bool:
                assert process.returncode is None, f"transformers serve ended with {process.returncode}"
                with contextlib.suppress(aiohttp.ClientError):
                    async with session.get("/health") as response:
                        return response.status == 200
                return False

            while not await is_there():
                await asyncio.sleep(0.2)

            async def ask(prompt: list[int], adapter: str | None) -> tuple[float, int]:
                began, first, count = time.perf_counter(), 0.0, 0
                body = {"model": str(model.path), "prompt": tokenizer.decode(prompt), "stream": True}
                body |= {"max_tokens": NEW_TOKENS, "temperature": 0}
                async with session.post("/v1/completions", json=body) as response:
                    assert response.status == 200, await response.text()
                    async for event in events(response):
                        first = first or time.perf_counter() - began
                        count = (event.get("usage") or {}).get("completion_tokens", count)
                assert count, "it ended without telling how many tokens there were"
                return first, count

            yield ask
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


@contextlib.asynccontextmanager
async def generate(model: ResolvedModel) -> AsyncIterator[Ask]:
    """transformers' generate, one request after another, in the precision that is quicker on this machine."""
    from tunesmith.models.machine import machine

    here = machine()
    import torch
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model.path, dtype=getattr(torch, here.precision)).eval()

    class Times:
        """A streamer that only looks at the clock: it is given the prompt, then each token."""

        def __init__(self) -> None:
            self.seen: list[float] = []

        def put(self, tokens: Any) -> None:
            self.seen.append(time.perf_counter())

        def end(self) -> None:
            pass

    async def ask(prompt: list[int], adapter: str | None) -> tuple[float, int]:
        ids, times = torch.tensor([prompt]), Times()
        told = {"attention_mask": torch.ones_like(ids), "do_sample": False, "pad_token_id": 2, "eos_token_id": [0, 2]}
        began = time.perf_counter()
        out = loaded.generate(ids, max_new_tokens=NEW_TOKENS, streamer=times, **told)
        return times.seen[1] - began, out.shape[1] - len(prompt) - (out[0, -1].item() in told["eos_token_id"])

    yield ask


async def measure(ask: Ask, asked: Sequence[tuple[list[int], str | None]], at_once: int) -> dict[str, float]:
    """Answer all, `at_once` at a time."""
    places = asyncio.Semaphore(at_once)

    async def one(prompt: list[int], adapter: str | None) -> tuple[float, int]:
        async with places:
            return await ask(prompt, adapter)

    began = time.perf_counter()
    told = await asyncio.gather(*(one(*each) for each in asked))
    seconds = time.perf_counter() - began
    return {
        "tokens_per_second": sum(count for _, count in told) / seconds,
        "first_token_ms": 1000 * statistics.median(first for first, _ in told),
        "tokens": sum(count for _, count in told),
    }


def make_adapters(model: ResolvedModel, folder: Path, count: int) -> dict[str, Path]:
    """Drawn LoRA adapters of rank 8 on all linear layers, too small to change what is answered by much."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32)
    found = {}
    for number in range(count):
        torch.manual_seed(number)
        tuned = get_peft_model(base, LoraConfig(r=8, target_modules="all-linear", init_lora_weights="gaussian"))
        found[f"adapter-{number}"] = folder / f"adapter-{number}"
        tuned.save_pretrained(found[f"adapter-{number}"])
        base = tuned.unload()
    return found


def contender(name: str, model: ResolvedModel, slots: int, adapters: dict[str, Path], precision: str) -> Any:
    if name == "llama-server":
        return llama_server(model, slots, precision)
    if name.startswith("transformers-serve"):
        return transformers_serve(model, name.endswith("-cb"))
    return generate(model) if name == "generate" else engine(name, model, slots, adapters, precision)


async def once(
    name: str,
    model: ResolvedModel,
    asked: Sequence[tuple[list[int], str | None]],
    many: int,
    adapters: dict[str, Path],
    precision: str,
) -> dict[str, float]:
    async with contender(name, model, many, adapters, precision) as ask:
        await measure(ask, asked[:many], many)  # warm
        return await measure(ask, asked, many)


def middle(rows: Sequence[dict[str, float]], key: str) -> float:
    return statistics.median(row[key] for row in rows)


def told(rows: Sequence[dict[str, float]], **about: Any) -> dict[str, Any]:
    """Medians over the rounds, printed."""
    row = about | {key: middle(rows, key) for key in rows[0]}
    print("  ".join(f"{k}={v:.1f}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    return row


def ratio(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]], what: str) -> dict[str, Any]:
    """The median of the rounds' ratios in tokens per second, and all of them, printed."""
    each = sorted(a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(ours, theirs, strict=True))
    row = {"ratio": what, "median": round(statistics.median(each), 2), "rounds": [round(x, 2) for x in each]}
    print(json.dumps(row), flush=True)
    return row


async def engines(
    names: Sequence[str], at_once: Sequence[int], count: int, precision: str, rounds: int
) -> list[dict[str, Any]]:
    model = resolve(ModelSection(name=MODEL))
    asked = [(prompt, None) for prompt in prompts(model)]
    rows: list[dict[str, Any]] = []
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    for many in at_once:
        some = asked[: 8 if many == 1 else QUESTIONS]
        asks = [name for name in names if many == 1 or name != "generate"]
        for _ in range(rounds):
            for name in asks:
                found.setdefault((name, many), []).append(await once(name, model, some, many, {}, precision))
        rows += [told(found[name, many], engine=name, at_once=many) for name in asks]
        for ours in (name for name in asks if name in OURS):
            for other, beside in (("llama-server", many), ("generate", 1)):
                if (other, beside) in found and (ours == "llamacpp" or other == "generate"):
                    what = f"{ours} at {many} by {other}" + (" alone" if other == "generate" else "")
                    rows.append(ratio(found[ours, many], found[other, beside], what))
    if not count:
        return rows
    with tempfile.TemporaryDirectory() as folder:
        adapters = make_adapters(model, Path(folder), count)
        names_of = list(adapters)
        for name in [name for name in names if name in OURS]:
            shared: dict[int, list[dict[str, float]]] = {1: [], count: []}
            for _ in range(rounds):
                for used, seen in shared.items():
                    each = [(prompt, names_of[i % used]) for i, (prompt, _) in enumerate(asked)]
                    seen.append(await once(name, model, each, max(at_once), adapters, precision))
            rows += [told(seen, engine=name, adapters=used) for used, seen in shared.items()]
            rows.append(ratio(shared[count], shared[1], f"{name}, {count} adapters by one"))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", default="llamacpp,llama-server,transformers,transformers-serve,generate")
    parser.add_argument("--at-once", default="1,8,32")
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="q8_0")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = asyncio.run(
        engines(
            given.engines.split(","),
            [int(n) for n in given.at_once.split(",")],
            given.adapters,
            given.precision,
            given.rounds,
        )
    )
    if given.json:
        given.json.write_text(json.dumps(found, indent=2))
