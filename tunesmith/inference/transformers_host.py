"""The process that holds a transformers model and answers many at once."""

from __future__ import annotations

import contextlib
import os
import queue
import threading
from functools import cache
from pathlib import Path
from typing import Any

from tunesmith.errors import TunesmithError
from tunesmith.inference.host import Wire
from tunesmith.inference.served import Request
from tunesmith.models.machine import machine
from tunesmith.models.resolve import ResolvedModel

PROBE = 24  # tokens


def main() -> None:
    wire = Wire()
    messages = wire.told()
    try:
        engine = opened(next(messages), wire)
    except Exception as error:
        wire.refuse(error)
        return
    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=lambda: [*map(inbox.put, messages), os._exit(0)], daemon=True).start()
    wire.tell(ready={"pid": os.getpid()})
    leaving: dict[str, int] = {}  # adapters that go when nobody uses them, and who asked for it
    while True:
        with contextlib.suppress(queue.Empty):
            while True:
                message = inbox.get(block=not engine.busy and not leaving)
                assert message is not None
                _handle(engine, wire, leaving, message)
                if engine.busy and inbox.empty():
                    break
        for name in [n for n in leaving if not engine.using(n)]:
            engine.unload(name)
            wire.tell(done=leaving.pop(name))
        if engine.busy:
            engine.turn()


def _handle(engine: Any, wire: Wire, leaving: dict[str, int], message: dict[str, Any]) -> None:
    kind, number = message["do"], message["number"]
    try:
        if kind == "ask":
            told = message["request"]
            told["logit_bias"] = {int(token): bias for token, bias in told["logit_bias"].items()}
            engine.ask(number, Request(**told))
        elif kind == "cancel":
            engine.cancel(number)
        elif kind == "load":
            engine.load(message["name"], Path(message["path"]))
            wire.tell(done=number)
        elif kind == "unload":
            leaving[message["name"]] = number
        elif kind == "embed":
            wire.tell(done=number, found=engine.embed(message["prompt"]))
        elif kind == "read":
            wire.tell(done=number, found=engine.read_back(message["prompt"], message["adapter"], message["top"]))
    except TunesmithError as error:
        wire.tell(done=number, error=error.as_dict())
    except Exception as error:
        wire.tell(done=number, error={"type": "EngineError", "what": str(error), "where": None, "fix": None})


def opened(told: dict[str, Any], wire: Wire) -> Any:
    """The model, loaded and ready for requests."""
    here = machine()  # first: its limits must stand before torch is there
    import torch

    from tunesmith.inference.continuous import Continuous
    from tunesmith.inference.rows import Apart, Rows
    from tunesmith.models.attention import CannotPack
    from tunesmith.models.load import is_adapter, load_model, load_renderer, load_tuned
    from tunesmith.models.loras import Loras
    from tunesmith.models.machine import reuse_buffers

    reuse_buffers()
    model = ResolvedModel(**{**told["model"], "path": Path(told["model"]["path"])})
    precision = here.precision if told["precision"] == "auto" else told["precision"]
    dtype = getattr(torch, precision)
    beside = model.path / "adapter"  # in a package whose adapter can't be merged
    loaded: Any = (
        load_tuned(model, beside, dtype, here.device)
        if beside.is_dir() and is_adapter(beside)
        else load_model(model, dtype, here.device)
    )
    virtual = list(getattr(loaded, "virtual_ids", []))
    renderer = load_renderer(model)
    tokenizer = renderer.tokenizer
    rows: Rows | Apart
    try:
        if hasattr(loaded, "active_peft_config") and not virtual:
            raise CannotPack("keys and values are trained")
        whole = loaded.get_base_model() if hasattr(loaded, "get_base_model") else loaded
        probe = virtual + [3 + i % 50 for i in range(PROBE)]
        tolerance = 1e-3 if precision == "float32" else 0.1
        rows = Rows(whole, told["slots"], told["prefix_mb"] * 2**20, probe, tolerance)
    except CannotPack:
        whole, rows = loaded, Apart(loaded, told["slots"])

    @cache
    def grammars() -> Any:
        import llguidance.hf

        vocabulary = whole.get_output_embeddings().weight.shape[0]
        return llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary, eos_token=renderer.stop_ids)

    engine = Continuous(rows, Loras(whole), tokenizer, lambda pieces: wire.tell(pieces=pieces), grammars, virtual)
    for name, path in told["adapters"].items():
        engine.load(name, Path(path))
    return engine


if __name__ == "__main__":
    main()
