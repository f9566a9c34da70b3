"""Every method with every adapter in every precision: a cell is trained for two steps and gone on with, or refused.

`tests/test_cells.py` tries some of the cells each time, and all of them when asked for long tests;
`tools/adapter_table.py` tries all and writes docs/adapters.md.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.conftest import COLOURS
from tunesmith import plugins
from tunesmith.conversation.message import Conversation, Message, Preference, Rated, Text
from tunesmith.errors import TunesmithError

ADAPTERS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora", "rank": 4, "alpha": 8},
    "rslora": {"kind": "lora", "rank": 4, "rslora": True},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "lora, pissa": {"kind": "lora", "rank": 4, "alpha": 4, "init": "pissa"},
    "lora, olora": {"kind": "lora", "rank": 4, "alpha": 4, "init": "olora"},
    "lora, loftq": {"kind": "lora", "rank": 4, "alpha": 4, "init": "loftq"},
    "lora, eva": {"kind": "lora", "rank": 4, "init": "eva"},
    "lora+": {"kind": "lora", "rank": 4, "b_rate": 4},
    "adalora": {"kind": "adalora", "rank": 2, "warm": 0, "settled": 0},
    "loha": {"kind": "loha", "rank": 4, "alpha": 8},
    "lokr": {"kind": "lokr", "rank": 4, "alpha": 8},
    "vera": {"kind": "vera", "rank": 8},
    "oft": {"kind": "oft", "block_size": 8},
    "boft": {"kind": "boft", "block_size": 4},
    "ia3": {"kind": "ia3"},
    "prompt": {"kind": "prompt", "tokens": 4},
    "p-tuning": {"kind": "p-tuning", "tokens": 4},
    "prefix": {"kind": "prefix", "tokens": 4},
    "tokens": {"kind": "tokens"},
    "bottleneck, houlsby": {"kind": "bottleneck", "style": "houlsby", "size": 8},
    "bottleneck, pfeiffer": {"kind": "bottleneck", "size": 8},
    "bottleneck, parallel": {"kind": "bottleneck", "style": "parallel", "size": 8},
    "full": {"kind": "full"},
    "partial": {"kind": "partial", "last_layers": 1},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {"precision": "float32"},
    "bfloat16": {"precision": "bfloat16"},
    **{name: {"precision": "bfloat16", "quantise": name} for name in ("nf4", "int8", "int4-torchao", "int8-torchao")},
}


def methods() -> list[str]:
    """All that there are, other packages' too."""
    return list(plugins.known("objective"))


def cells() -> Iterator[tuple[str, str, str]]:
    """Every method, adapter and precision."""
    for adapter in ADAPTERS:
        for precision in PRECISIONS:
            for method in methods():
                yield method, adapter, precision


def rows(kind: str) -> list[Any]:
    """A few rows of a kind."""
    found: list[Any] = []
    for i in range(6):
        asked = Message("user", f"Item {i} is {COLOURS[i % 4]}. What colour is it?")
        right, wrong = Message("assistant", COLOURS[i % 4]), Message("assistant", COLOURS[(i + 1) % 4])
        if kind == "preference":
            found.append(Preference((asked, right), f"r:{i}", rejected=(wrong,), shared=1))
        elif kind == "rated":
            found.append(Rated((asked, right if i % 2 else wrong), f"r:{i}", good=bool(i % 2)))
        elif kind == "text":
            found.append(Text((), f"r:{i}", text=f"{asked.content} {right.content}. " * 3))
        else:
            found.append(Conversation((asked, right), f"r:{i}"))
    return found


def tried(method: str, adapter: str, precision: str, model: Path, work: Path) -> str:
    """Train a cell for two steps, drop the second, go on, and compare; returns why it was refused, or nothing.

    Raises:
        AssertionError: it did not end where it ended before.
    """
    import torch
    from pydantic import ValidationError

    from tunesmith.models.load import load_renderer
    from tunesmith.models.machine import machine
    from tunesmith.models.resolve import ResolvedModel
    from tunesmith.runs import Run
    from tunesmith.train.inputs import TrainInputs
    from tunesmith.train.section import TrainSection
    from tunesmith.train.train import train

    words = ("Zyxelith",) if adapter == "tokens" else ()
    base = ResolvedModel("tiny", model, "folder", "0" * 64, None, None, False, None, None, new_words=words)
    settings = {"batch_size": 3, "epochs": 1, "max_steps": 2, "checkpoint_every": 1, "max_length": 128}
    named: Any = {"kind": method, "teacher": str(model)} if method == "distill" else method
    settings |= {"method": named, "adapter": ADAPTERS[adapter], "keep_checkpoints": 2}
    takes = plugins.load("objective", method).takes
    run = Run(work / "run")
    shutil.rmtree(run.path, ignore_errors=True)
    run.stage("train").mkdir(parents=True)
    try:
        section = TrainSection.model_validate(settings | {"learning_rate": 0.003} | PRECISIONS[precision])
        given = rows(takes)
        inputs = TrainInputs(given, given[:2], base, load_renderer(base), machine(), 7)
        told = train(section, inputs, run)
    except ValidationError as error:
        return str(error.errors()[0]["msg"]).removeprefix("Value error, ")
    except TunesmithError as error:
        return error.what.replace(str(model), "the teacher")
    assert told["steps"] == 2
    first = _files(run.tuned)
    for gone in (run.tuned, run.checkpoints / "step-000002"):
        shutil.rmtree(gone)
    torch.manual_seed(99)
    train(section, inputs, run)
    assert _files(run.tuned) == first, f"{method}, {adapter}, {precision}: went on to other weights"
    return ""


def _files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
