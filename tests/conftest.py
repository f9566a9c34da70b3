"""Tiny models and data, built in the process; and the command line as a function."""

from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tunesmith.models.machine import machine
from tunesmith.models.resolve import cache_folder

SHARED = Path(os.environ.get("TUNESMITH_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
COLOURS = ("red", "green", "blue", "black")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted models and the machine's probe go to a folder of the test session's own, which has what the processor
    can't do before torch multiplies. What the installation has found out of the machine is taken from there, but that
    bfloat16 may be faster: tests that compare answers to the token must not depend on it."""
    with pytest.MonkeyPatch.context() as patch:
        if not os.environ.get("TUNESMITH_CACHE"):
            own = tmp_path_factory.mktemp("cache")
            for known in cache_folder().glob("machine-*.json"):
                shutil.copy(known, own)
            patch.setenv("TUNESMITH_CACHE", str(own))
            machine()
            for probed in own.glob("machine-*.json"):
                probed.write_text(json.dumps(json.loads(probed.read_text()) | {"precision": "float32"}))
            machine.cache_clear()
        patch.delenv("TUNESMITH_RUNS", raising=False)
        machine()
        yield


@pytest.fixture(scope="module", autouse=True)
def _libraries_are_not_garbage() -> None:
    """A stage collects garbage between two models; among every library that tests import that takes a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data for tests, where it is there; never part of the project."""
    if not SHARED.is_dir():
        pytest.skip(f"no shared test data in {SHARED} (set TUNESMITH_TEST_DATA)")
    return SHARED


def make_tokenizer(template: str | None = CHATML) -> Any:
    """A byte-level BPE tokenizer with ChatML's tokens, trained on a few sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    raw.train_from_iterator(["What colour is it? The answer is red, green, blue or black."] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def make_model(folder: Path, template: str | None = CHATML, architecture: str = "llama", **config: Any) -> Path:
    """A seeded model of two layers with its tokenizer, saved as the hub would have it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = make_tokenizer(template)
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
        "initializer_range": 0.3,  # large enough that adapters can move the logits
    } | config
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **settings))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny") / "tiny-llama")


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def colour_rows(n: int = 60) -> list[dict[str, Any]]:
    """Questions whose answer is a colour that they name: learnable, and label-like."""
    return [
        {"prompt": f"Item {i} is {COLOURS[i % 4]}. What colour is it?", "completion": COLOURS[i % 4]} for i in range(n)
    ]


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> dict[str, Any]:
    """A recipe's keys for a run of a second or two."""
    write_jsonl(tmp_path / "rows.jsonl", colour_rows())
    return {
        "name": "tiny",
        "model": str(tiny_model),
        "data": {"sources": [{"path": str(tmp_path / "rows.jsonl")}], "split": {"validation": 6, "test": 8}},
        "train": {
            "epochs": 1,
            "max_steps": 6,
            "batch_size": 4,
            "learning_rate": 0.01,
            "max_length": 128,
            "checkpoint_every": 2,
            "precision": "float32",
            "adapter": {"kind": "lora", "rank": 4, "alpha": 8},
        },
        "evaluate": {"max_new_tokens": 4},
    }


def write_recipe(folder: Path, keys: dict[str, Any], name: str = "tiny.yaml") -> Path:
    import yaml

    path = folder / name
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


@dataclass
class Said:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def tunesmith(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., Said]:
    """The command line, run in this process from a folder of its own."""
    from tunesmith import cli, progress

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> Said:
        monkeypatch.setattr(progress, "_console", None)
        monkeypatch.setattr(sys, "argv", ["tunesmith", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
        said = capsys.readouterr()
        return Said(code, said.out, said.err)

    return call


@pytest.fixture(scope="session")
def renderer() -> Any:
    from tunesmith.conversation.render import Renderer

    return Renderer(make_tokenizer())


@pytest.fixture
def prepared(renderer: Any, tmp_path: Path) -> Callable[..., Any]:
    """The data stage, run on some sources: gives a tests.prepared.Prepared. Nothing is held out unless said."""
    from tests.prepared import Prepared
    from tunesmith.data.prepare import DataInputs, prepare
    from tunesmith.data.section import DataSection

    def run(*sources: Any, seed: int = 7, max_length: int = 10_000, renderer: Any = renderer, **keys: Any) -> Prepared:
        section = DataSection(sources=list(sources), **({"split": {"validation": 0, "test": 0}} | keys))
        target = tmp_path / "out"
        target.mkdir(exist_ok=True)
        told = prepare(section, DataInputs(renderer, max_length, seed, tmp_path), target)
        return Prepared(target, told)

    return run


@pytest.fixture(scope="session")
def postgres() -> Any:
    """A PostgreSQL server of the tests' own."""
    from tests.postgres import serve

    yield from serve()


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The address of an empty database, of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/tunesmith.db"
    address: str = request.getfixturevalue("postgres").database()
    return address
