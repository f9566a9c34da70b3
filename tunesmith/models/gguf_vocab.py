"""A tokenizer's JSON -> the fields in which GGUF keeps it, and what those say of taking text apart."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tunesmith.errors import ModelError

# How text is taken apart before merges, as llama.cpp names it, by the regular expressions that do it.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DIGIT = r"\p{Nd}"
SPLITS = {
    (GPT2,): "gpt-2",
    (DIGIT, GPT2): "smollm",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "llama-bpe",
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+",
    ): "qwen2",
}
WAY = "tokenizer.ggml.pre"
BYTE = re.compile(r"<0x[0-9A-F]{2}>$")


def add_vocabulary(writer: Any, folder: Path, size: int, stops: list[int]) -> None:
    """Write a tokenizer's words, merges, special tokens and chat template.

    Args:
        writer: a gguf.GGUFWriter.
        size: rows of the model's embedding; places without a word are marked as unused.
        stops: ids that end an answer.

    Raises:
        ModelError: a tokenizer that GGUF has no name for.
    """
    from gguf import TokenType

    told, split = check_vocabulary(folder)
    config, model = _json(folder / "tokenizer_config.json"), told["model"]
    words = [f"[PAD{i}]" for i in range(size)]
    kinds = [TokenType.UNUSED] * size
    for word, i in model["vocab"].items():
        words[i] = word
        kinds[i] = TokenType.BYTE if model.get("byte_fallback") and BYTE.match(word) else TokenType.NORMAL
    for added in told["added_tokens"]:
        words[added["id"]] = added["content"]
        kinds[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    if split is None:  # as sentencepiece makes them
        if model.get("unk_token") is not None:
            kinds[model["vocab"][model["unk_token"]]] = TokenType.UNKNOWN
        rank: dict[str, int] = {}
        for place, merge in enumerate(merges):
            rank.setdefault(merge.replace(" ", ""), place)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores([-float(rank.get(word, len(merges))) for word in words])
        writer.add_add_space_prefix(_prefixed(told))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(split)
        writer.add_token_merges(merges)
    writer.add_token_list(words)
    writer.add_token_types(kinds)
    ids = {word: i for i, word in enumerate(words)}
    for name in ("bos", "eos", "unk", "pad"):
        token = config.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        if token in ids:
            getattr(writer, f"add_{name}_token_id")(ids[token])
    others = [i for i in stops if words[i] != config.get("eos_token")]
    for add, i in zip((writer.add_eot_token_id, writer.add_eom_token_id), others, strict=False):
        add(i)
    writer.add_add_bos_token(_begins(told.get("post_processor") or {}))
    writer.add_add_eos_token(False)
    template = _template(folder, config)
    if template:
        writer.add_chat_template(template)


def check_vocabulary(folder: Path) -> tuple[dict[str, Any], str | None]:
    """What tokenizer.json says, and llama.cpp's name for what stands before its merges; None for sentencepiece's.

    Raises:
        ModelError: a tokenizer that GGUF has no name for.
    """
    told = _json(folder / "tokenizer.json", needed=True)
    if told["model"].get("type") != "BPE":
        raise ModelError(
            f"GGUF files are written of BPE tokenizers, and this is a {told['model'].get('type')}",
            where=str(folder / "tokenizer.json"),
            fix="Leave package.gguf out; serve it with engine: transformers.",
        )
    return told, None if told["model"].get("byte_fallback") else _split(told["pre_tokenizer"], folder)


def take_apart(tokenizer: Any, file: Path) -> str | None:
    """Let a tokenizer that transformers read from a GGUF file take text apart as the file says: transformers takes
    GPT-2's way where it knows no other.

    Returns:
        llama.cpp's name for the file's way, where it is none of SPLITS and so was left as it is; else None.
    """
    from gguf import GGUFReader
    from tokenizers import Regex, pre_tokenizers

    fields = GGUFReader(file).fields
    model, way = (fields[name].contents() if name in fields else None for name in ("tokenizer.ggml.model", WAY))
    if model != "gpt2" or way is None:
        return None
    patterns = next((patterns for patterns, name in SPLITS.items() if name == way), None)
    if patterns is None:
        return str(way)
    parts: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True) if p == DIGIT else pre_tokenizers.Split(Regex(p), "isolated")
        for p in patterns
        if p != GPT2
    ]
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=GPT2 in patterns))
    raw = tokenizer.backend_tokenizer
    raw.pre_tokenizer = pre_tokenizers.Sequence(parts)
    raw.model.ignore_merges = way == "llama-bpe"
    return None


def _json(path: Path, needed: bool = False) -> dict[str, Any]:
    if not path.is_file():
        if needed:
            raise ModelError(
                "the tokenizer has no tokenizer.json, which a GGUF file is written from",
                where=str(path.parent),
                fix="Save it with transformers' AutoTokenizer(...).save_pretrained.",
            )
        return {}
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _split(told: dict[str, Any] | None, folder: Path) -> str:
    """The name of what stands before the merges."""
    parts = told.get("pretokenizers", [told]) if told else []
    patterns: list[str] = []
    for part in parts:
        if part["type"] == "Split":
            patterns.append(part["pattern"].get("Regex") or part["pattern"].get("String"))
        elif part["type"] == "Digits" and part["individual_digits"]:
            patterns.append(DIGIT)
        elif part["type"] == "ByteLevel":
            patterns += [GPT2] * part.get("use_regex", True)
        else:
            patterns.append(part["type"])
    if tuple(patterns) not in SPLITS:
        raise ModelError(
            f"the tokenizer takes text apart in a way that this version has no GGUF name for ({patterns})",
            where=str(folder / "tokenizer.json"),
            fix="Leave package.gguf out, or convert the packaged folder with llama.cpp's own script.",
        )
    return SPLITS[tuple(patterns)]


def _prefixed(told: dict[str, Any]) -> bool:
    """Whether a space is put before a text."""
    for part in (told.get("normalizer"), told.get("pre_tokenizer")):
        for step in (part or {}).get("normalizers", [part]) if part else []:
            if step["type"] == "Prepend" or step.get("prepend_scheme", "never") != "never":
                return True
    return False


def _begins(post: dict[str, Any]) -> bool:
    """Whether a text begins with a special token."""
    for part in post.get("processors", [post]):
        single = part.get("single") or []
        if single and "SpecialToken" in single[0]:
            return True
    return False


def _template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = config.get("chat_template")
    return found if isinstance(found, str) else None
