"""Tokenizer, renderer and weights of a resolved model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.conversation.render import Renderer
from tunesmith.errors import ModelError, first_line
from tunesmith.models.resolve import ResolvedModel
from tunesmith.progress import clock

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

CLASSES = "classes.json"  # beside the weights of a model whose head tells classes apart
LOADED_PER_SECOND = 250e6  # bytes of weights, for the bar


def silence() -> None:
    """Keep transformers' own bars and notes off the screen: errors reach the user as ours."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft")


def load_renderer(model: ResolvedModel) -> Renderer:
    """The model's renderer, checked: an answer ends with a token that stops generation.

    Raises:
        ModelError: no tokenizer, or a template that can't be trained with.
    """
    from transformers import AutoTokenizer, GenerationConfig

    silence()
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.path, trust_remote_code=model.trust_remote_code)
    except Exception as error:  # its parsers, in Rust and in Python, raise anything
        raise ModelError(
            f"its tokenizer can't be loaded ({first_line(error)})",
            where=str(model.path),
            fix="Give the whole model folder, with tokenizer.json and tokenizer_config.json.",
        ) from error
    ends: list[int] = []
    if (model.path / "generation_config.json").is_file():
        try:
            found = GenerationConfig.from_pretrained(model.path).eos_token_id
        except (OSError, ValueError, TypeError) as error:
            raise ModelError(
                f"its generation_config.json can't be read ({first_line(error)})",
                where=str(model.path),
                fix="Fetch the model again, or remove that file.",
            ) from error
        ends = found if isinstance(found, list) else [found] if found is not None else []
    if model.end_of_turn:
        token = tokenizer.get_vocab().get(model.end_of_turn)
        if token is None:
            raise ModelError(
                f"the tokenizer has no token '{model.end_of_turn}'",
                where="model.end_of_turn",
                fix="Name a token of its vocabulary.",
            )
        ends.append(token)
    renderer = Renderer(tokenizer, model.chat_template, ends)
    renderer.check()
    return renderer


def context_length(model: ResolvedModel) -> int | None:
    """The longest sequence in tokens that the model's configuration allows, where it says so."""
    config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    if not isinstance(config, dict):
        return None
    config = config.get("text_config") or config
    length = config.get("max_position_embeddings") or config.get("n_positions")
    return length if isinstance(length, int) else None


def load_model(
    model: ResolvedModel, dtype: torch.dtype, device: str = "cpu", classes: Sequence[str] = ()
) -> PreTrainedModel:
    """The base model's weights in `dtype`, in evaluation mode.

    Args:
        classes: if given, the model ends with a score for each of them instead of its language head; the scores'
            weights are drawn by torch's seed where the files have none.

    Raises:
        ModelError: files that are damaged or of an architecture that transformers does not have.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    silence()
    kind = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    numbers = {name: i for i, name in enumerate(classes)}
    head = {"id2label": {i: name for name, i in numbers.items()}, "label2id": numbers} if classes else {}
    size = sum(p.stat().st_size for p in model.path.glob("*.safetensors"))
    try:
        with clock(f"Loading {model.name}", 1 + size / LOADED_PER_SECOND):
            loaded, report = kind.from_pretrained(
                model.path,
                **head,
                dtype=dtype,
                trust_remote_code=model.trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"can't be loaded as a causal language model ({first_line(error)})",
            where=str(model.path),
            fix="Check that the folder is whole and that this version of transformers knows its model_type.",
        ) from error
    if classes and not hasattr(loaded, "score"):
        raise ModelError(
            f"architecture {loaded.config.model_type} can't be given a head of classes",
            where=str(model.path),
            fix="Take a decoder whose head transformers calls `score` (Llama, Mistral, Qwen, Gemma, GPT-2 and others).",
        )
    missing = [key for key in report["missing_keys"] if not (classes and key.startswith("score."))]
    if missing:  # transformers would go on with random numbers in their place
        raise ModelError(
            f"lacks {len(missing)} of its weights, such as {min(missing)}",
            where=str(model.path),
            fix="Fetch the model again; a base without a language model's head can't be used.",
        )
    return loaded.to(device).eval()


def classes_of(tuned: Path) -> list[str]:
    """What the head of a tuned model tells apart; nothing where it is a language head."""
    found: list[str] = _head(tuned).get("classes", [])
    return found


def _head(tuned: Path) -> dict[str, Any]:
    """What is kept beside the weights of a model that has no language head: its classes, and what is padding to it."""
    try:
        found: dict[str, Any] = json.loads((tuned / CLASSES).read_text(encoding="utf-8"))
        return found
    except FileNotFoundError:
        return {}


def load_tuned(model: ResolvedModel, adapter: Path, dtype: torch.dtype, device: str = "cpu", merge: bool = True) -> Any:
    """The base with a PEFT adapter: merged into its weights, or on top of them; or the whole model that full
    training saved in its place.

    Merging is done in float32 and rounded once, so that a bfloat16 base loses no more than it must.
    """
    import torch
    from peft import PeftModel

    classes = classes_of(adapter)
    if not (adapter / "adapter_config.json").is_file():
        return load_model(replace(model, path=adapter), dtype, device, classes)
    base = load_model(model, torch.float32 if merge else dtype, device, classes)
    if classes:
        base.config.pad_token_id = _head(adapter)["pad_token_id"]
    try:
        tuned = PeftModel.from_pretrained(base, str(adapter))
        if merge:
            tuned = tuned.merge_and_unload(safe_merge=True).to(dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"the adapter does not fit the model ({first_line(error)})",
            where=str(adapter),
            fix="Use the base that it was trained on.",
        ) from error
    return tuned.eval()
