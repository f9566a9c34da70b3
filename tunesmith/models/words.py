"""Words that are added to a model's vocabulary: one token each, whose embedding starts as the mean of its pieces'."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tunesmith.errors import ModelError, first_line
from tunesmith.models.resolve import ResolvedModel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_tokenizer(model: ResolvedModel) -> tuple[PreTrainedTokenizerBase, dict[int, list[int]]]:
    """The model's tokenizer with `model.new_words` in it, and each word's pieces before it was (none if it was one).

    Raises:
        ModelError: no tokenizer that can be read.
    """
    from transformers import AddedToken, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # its parsers, in Rust and in Python, raise anything
        raise ModelError(
            f"its tokenizer can't be loaded ({first_line(error)})",
            where=str(model.path),
            fix="Give the whole model folder, with tokenizer.json and tokenizer_config.json.",
        ) from error
    known = tokenizer.get_vocab()
    pieces = {
        word: [] if word in known else tokenizer(word, add_special_tokens=False)["input_ids"]
        for word in model.new_words
    }
    tokenizer.add_tokens([AddedToken(word, normalized=False) for word in model.new_words if word not in known])
    return tokenizer, {tokenizer.convert_tokens_to_ids(word): ids for word, ids in pieces.items()}


def grow(loaded: PreTrainedModel, model: ResolvedModel) -> None:
    """Give a loaded model rows for `model.new_words` (in place), and tell their ids in `new_word_ids`."""
    import torch

    if not model.new_words:
        return
    tokenizer, pieces = load_tokenizer(model)
    if len(tokenizer) > loaded.get_input_embeddings().weight.shape[0]:
        loaded.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    found: dict[int, Any] = {id(m): m for m in (loaded.get_input_embeddings(), loaded.get_output_embeddings()) if m}
    with torch.no_grad():
        for module in found.values():
            for word, ids in pieces.items():
                if ids and not module.weight.is_meta:
                    module.weight[word] = module.weight[ids].float().mean(0).to(module.weight.dtype)
    loaded.new_word_ids = sorted(pieces)
