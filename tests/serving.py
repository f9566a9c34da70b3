"""A tiny model with two adapters behind a serving engine, and what plain transformers and PEFT answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.conftest import make_model, make_tokenizer
from tunesmith.inference.engines import EngineSection
from tunesmith.inference.served import Piece, Request
from tunesmith.models.resolve import resolve
from tunesmith.models.section import ModelSection

STOPS = (0, 2)
PARTS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONTEXT = 256


def odd_ids() -> list[int]:
    """Tokens that hold a part of a letter: a model that was never trained says many."""
    tokenizer = make_tokenizer()
    return [i for i in range(len(tokenizer)) if not tokenizer.decode([i]).isascii()]


BIAS = dict.fromkeys(odd_ids(), -1000.0)
ENDLESS = BIAS | dict.fromkeys(STOPS, -1000.0)


def prompts() -> list[list[int]]:
    tokenizer = make_tokenizer()
    texts = ["What colour is it?", "The answer is red, green, blue or black. " * 4, "?"]
    return [tokenizer(text)["input_ids"] for text in texts]


def greedy(model: Any, prompt: Sequence[int], banned: Sequence[int] = tuple(BIAS), count: int = 24) -> list[int]:
    """The plain loop that every engine must agree with."""
    import torch

    ids = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            scores = model(input_ids=torch.tensor([ids])).logits[0, -1]
            scores[list(banned)] = -torch.inf
            token = int(scores.argmax())
            if token in STOPS:
                break
            ids.append(token)
    return ids[len(prompt) :]


def make_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> Any:
    """A drawn LoRA adapter, saved; and the tuned model, which PEFT runs."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    lora = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": PARTS, "init_lora_weights": False} | settings)
    tuned = get_peft_model(model, lora).eval()
    tuned.save_pretrained(folder)
    return tuned


@dataclass
class Served:
    """An engine on a loop of its own. `expected[adapter][i]` is the answer to `prompts()[i]`."""

    runner: asyncio.Runner
    engine: Any
    model: Path
    adapters: dict[str, Path]
    expected: dict[str | None, list[list[int]]]

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(work)

    async def pieces(self, request: Request) -> list[Piece]:
        return [piece async for piece in self.engine.stream(request)]

    async def ids(self, request: Request) -> list[int]:
        return [i for piece in await self.pieces(request) for i in piece.ids]

    async def answer(self, number: int, adapter: str | None = None) -> list[int]:
        return await self.ids(Request(prompts()[number], 24, STOPS, adapter=adapter, logit_bias=BIAS))


def build(section: EngineSection, model: Path) -> Any:
    return section.build("tiny", resolve(ModelSection(name=str(model))))


def serve(section: EngineSection, folder: Path, architecture: str = "llama") -> Served:
    """Start an engine on a new tiny model; two adapters lie beside it, not loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    model = make_model(folder / "tiny", architecture=architecture)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    expected: dict[str | None, list[list[int]]] = {None: [greedy(plain, p) for p in prompts()]}
    adapters = {}
    for number, name in enumerate(("first", "second")):
        adapters[name] = folder / name
        settings = {"r": 4 + 2 * number, "target_modules": PARTS[number:], "use_rslora": bool(number)}
        tuned = make_adapter(model, adapters[name], number, **settings)
        expected[name] = [greedy(tuned, p) for p in prompts()]
    runner = asyncio.Runner()
    engine = build(section, model)
    runner.run(engine.start())
    return Served(runner, engine, model, adapters, expected)
