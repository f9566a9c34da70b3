"""GGUF files say what the model says: greedy answers of llama.cpp in float32 are transformers'."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import CHATML, make_model, write_recipe
from tests.serving import BIAS, STOPS, greedy, make_adapter, prompts
from tunesmith.errors import ModelError
from tunesmith.inference.served import Request
from tunesmith.models import gguf_vocab
from tunesmith.models.gguf_file import write_adapter, write_model
from tunesmith.models.load import load_renderer
from tunesmith.models.resolve import resolve
from tunesmith.models.section import ModelSection

pytest.importorskip("xllamacpp")

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": False, "attention_bias": True, "rope_parameters": LLAMA3}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {}),
    ("qwen3", {"head_dim": 16}),
]


def asked(model: Path, base: Path, requests: Sequence[Request], adapters: dict[str, Path], **settings: Any) -> Any:
    """Answers' ids from llama.cpp, all asked at once."""
    from tunesmith.inference.llamacpp import LlamaCppEngine, Settings

    async def answers() -> list[list[int]]:
        told = {"precision": "float32", "context": 256, "slots": 4, "threads": 1, "queue": 64} | settings
        engine = LlamaCppEngine("tiny", Settings(model=model, base=resolve(ModelSection(name=str(base))), **told))
        await engine.start()
        try:
            for name, path in adapters.items():
                await engine.load_adapter(name, path)

            async def one(request: Request) -> list[int]:
                return [i async for piece in engine.stream(request) for i in piece.ids]

            return await asyncio.gather(*map(one, requests))
        finally:
            await engine.close()

    return asyncio.run(answers())


@pytest.mark.parametrize(("family", "settings"), FAMILIES, ids=lambda x: x if isinstance(x, str) else f"{len(x)}")
def test_a_model_and_a_lora_adapter_answer_as_transformers_does(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    folder = make_model(tmp_path / family, architecture=family, **settings)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [greedy(model, p) for p in prompts()]
    tuned = make_adapter(folder, tmp_path / "adapter", 1, use_rslora=True)
    with_adapter = [greedy(tuned, p) for p in prompts()]
    assert with_adapter != expected

    write_model(folder, tmp_path / "model.gguf", "float32")
    write_adapter(tmp_path / "adapter", folder, tmp_path / "adapter.gguf")
    requests = [
        Request(p, 24, STOPS, adapter=name, logit_bias=BIAS) for name in (None, "lora", None) for p in prompts()
    ]
    found = asked(tmp_path / "model.gguf", folder, requests, {"lora": tmp_path / "adapter.gguf"})
    assert found == expected + with_adapter + expected


@pytest.mark.parametrize("precision", ["bfloat16", "q8_0", "q5_1", "q4_0"])
def test_smaller_precisions_load_and_answer(tmp_path: Path, tiny_model: Path, precision: str) -> None:
    write_model(tiny_model, tmp_path / "model.gguf", precision)
    request = Request(prompts()[0], 8, logit_bias=BIAS | dict.fromkeys(STOPS, -1000.0))
    (found,) = asked(tmp_path / "model.gguf", tiny_model, [request], {}, precision=precision)
    assert len(found) == 8


def test_the_file_keeps_tokenizer_and_template(tmp_path: Path, tiny_model: Path) -> None:
    """Read back by transformers, which has a GGUF reader of its own."""
    from transformers import AutoTokenizer

    write_model(tiny_model, tmp_path / "model.gguf", "q8_0")
    own, read = (
        AutoTokenizer.from_pretrained(tiny_model),
        AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf"),
    )
    for text in ("What colour is it?", "<|im_start|>user\nÜber 12345 naïve 日本\n"):
        assert read(text)["input_ids"] == own(text)["input_ids"]
    assert read.chat_template == CHATML
    assert (read.bos_token_id, read.eos_token_id) == (own.bos_token_id, own.eos_token_id)


def made_tokenizer(kind: str) -> Any:
    """A small tokenizer of one of the ways that models' own take text apart."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from tunesmith.models.gguf_vocab import SPLITS

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "sentencepiece":
        raw = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet = list("abcdefghijklmnopqrstuvwxyz▁.,?0123456789")
    else:
        (patterns,) = [patterns for patterns, name in SPLITS.items() if name == kind]
        raw = Tokenizer(models.BPE(ignore_merges=kind == "llama-bpe"))
        split = pre_tokenizers.Split(Regex(patterns[0]), "isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
        first = {"gpt-2": [], "smollm": [pre_tokenizers.Digits(individual_digits=True)]}.get(kind, [split])
        raw.pre_tokenizer = pre_tokenizers.Sequence([*first, byte_level])
        raw.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256) if kind == "sentencepiece")]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special[:3], initial_alphabet=alphabet)
    text = "the quick brown fox jumps over the lazy dog 1234 times, and it's what we've seen. don't you think so?"
    raw.train_from_iterator([text, text.upper(), text.title()] * 3, trainer)
    if kind == "sentencepiece":
        told = json.loads(raw.to_str())
        told["model"]["vocab"] |= {byte: len(told["model"]["vocab"]) + i for i, byte in enumerate(special[3:])}
        raw = Tokenizer.from_str(json.dumps(told))
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="</s>")


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2", "sentencepiece"])
def test_llama_cpp_takes_text_apart_as_the_tokenizer_does(tmp_path: Path, kind: str) -> None:
    from transformers import AutoTokenizer

    from tunesmith.inference.llamacpp import LlamaCppEngine, Settings

    tokenizer = made_tokenizer(kind)
    folder = make_model(tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    write_model(folder, tmp_path / "model.gguf", "q8_0")
    texts = ["the quick brown fox", "It's 12345 times,\n\n  and don't  you?", "naïve Über 日本 🙂 FOX's", " lead"]

    async def found() -> list[list[int]]:
        base = resolve(ModelSection(name=str(folder)))
        told = {"precision": "float32", "context": 256, "slots": 1, "threads": 1, "queue": 1}
        engine = LlamaCppEngine("tiny", Settings(model=tmp_path / "model.gguf", base=base, **told))  # type: ignore[arg-type]
        await engine.start()
        try:
            answers = []
            for text in texts:
                async with engine._child.session.post("/tokenize", json={"content": text}) as response:  # type: ignore[union-attr]
                    answers.append((await response.json())["tokens"])
            return answers
        finally:
            await engine.close()

    assert asyncio.run(found()) == [tokenizer(text)["input_ids"] for text in texts]
    unpacked = AutoTokenizer.from_pretrained(resolve(ModelSection(name=str(tmp_path / "model.gguf"))).path)
    for text in texts if kind != "sentencepiece" else texts[:1]:  # transformers reads its leading spaces otherwise
        assert unpacked(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_way_of_taking_text_apart_that_is_not_known_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = made_tokenizer("smollm")
    folder = make_model(tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)
    monkeypatch.setitem(gguf_vocab.SPLITS, (gguf_vocab.DIGIT, gguf_vocab.GPT2), "of-tomorrow")
    write_model(folder, tmp_path / "model.gguf", "q8_0")
    monkeypatch.undo()
    resolve(ModelSection(name=str(tmp_path / "model.gguf")))
    assert "model.gguf takes text apart as 'of-tomorrow', which is not known here" in capsys.readouterr().err


def test_what_can_not_be_written_says_why(tmp_path: Path) -> None:
    opt = make_model(tmp_path / "gpt2", architecture="gpt2")
    with pytest.raises(ModelError, match="model_type gpt2"):
        write_model(opt, tmp_path / "a.gguf", "q8_0")
    mistral = make_model(tmp_path / "mistral", architecture="mistral", sliding_window=16)
    with pytest.raises(ModelError, match="sliding_window 16"):
        write_model(mistral, tmp_path / "a.gguf", "q8_0")
    tiny = make_model(tmp_path / "tiny")
    tokenizer = json.loads((tiny / "tokenizer.json").read_text())
    tokenizer["pre_tokenizer"] = {"type": "Whitespace"}
    (tiny / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="Whitespace"):
        write_model(tiny, tmp_path / "a.gguf", "q8_0")


def test_a_run_packages_gguf_files(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    recipe["package"] = {"gguf": ["float32", "q4_0"]}
    said = tunesmith("run", write_recipe(tmp_path, recipe))
    assert said.code == 0, said.err
    package = tmp_path / "runs/tiny/package"
    names = ["model-float32.gguf", "model-q4_0.gguf", "adapter.gguf"]
    assert json.loads((package / "manifest.json").read_text())["gguf"] == names
    assert all((package / "gguf" / name).stat().st_size > 1000 for name in names)
    assert "`model-q4_0.gguf`" in (package / "model/README.md").read_text()
    merged = AutoModelForCausalLM.from_pretrained(package / "model", dtype=torch.float32).eval()
    requests = [Request(p, 24, STOPS, logit_bias=BIAS) for p in prompts()]
    found = asked(package / "gguf" / names[0], package / "model", requests, {})
    assert found == [greedy(merged, p) for p in prompts()]


@pytest.mark.long
def test_the_embedded_model_answers_as_transformers_does(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tunesmith.conversation.message import Message

    model = resolve(ModelSection(name="smollm2-135m-instruct"))
    renderer = load_renderer(model)
    questions = ["Name three colours.", "What is the capital of France?", "Count: 1, 2, 3"]
    told = [renderer.prompt([Message("user", text)]) for text in questions]
    loaded = AutoModelForCausalLM.from_pretrained(model.path, dtype=torch.float32).eval()
    expected = [greedy(loaded, p, (), 20) for p in told]
    write_model(model.path, tmp_path / "model.gguf", "float32")
    requests = [Request(p, 20, STOPS) for p in told]
    assert asked(tmp_path / "model.gguf", model.path, requests, {}) == expected
    for precision, alike in (("q8_0", 2), ("q4_1", 0)):
        write_model(model.path, tmp_path / "small.gguf", precision)
        found = asked(tmp_path / "small.gguf", model.path, requests, {}, precision=precision)
        assert all(found) and sum(a[:4] == b[:4] for a, b in zip(found, expected, strict=True)) >= alike
