"""Tokenizer, renderer and weights of a resolved model."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.conversation.render import Renderer
from tunesmith.errors import ModelError, first_line
from tunesmith.models.arrays import adapter_config
from tunesmith.models.machine import give_back
from tunesmith.models.resolve import ResolvedModel, only_pickles
from tunesmith.models.words import grow, load_tokenizer
from tunesmith.progress import clock
from tunesmith.runs import read_json, write_json

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

BASE = "base.json"  # in an adapter's folder: the base it was made for
CLASSES = "classes.json"  # beside the weights of a model whose head tells classes apart
LOADED_PER_SECOND = 250e6  # bytes of weights, for the bar


def silence() -> None:
    """Keep transformers' own bars and notes off the screen: errors reach the user as ours."""
    import warnings

    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    warnings.filterwarnings("ignore", module="peft")  # what matters is checked here, and said as ours


def load_renderer(model: ResolvedModel) -> Renderer:
    """The model's renderer, checked: an answer ends with a token that stops generation.

    Raises:
        ModelError: no tokenizer, or a template that can't be trained with.
    """
    from transformers import GenerationConfig

    silence()
    tokenizer, _ = load_tokenizer(model)
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
    model: ResolvedModel,
    dtype: torch.dtype,
    device: str = "cpu",
    classes: Sequence[str] = (),
    quantise: str | None = None,
    lost_rank: int = 0,
) -> PreTrainedModel:
    """The base model's weights in `dtype`, in evaluation mode; its linear layers in the format `quantise`, if given
    (with what that loses, as matrices of rank `lost_rank`, beside them).

    Args:
        classes: if given, the model ends with a score for each of them instead of its language head; the scores'
            weights are drawn by torch's seed where the files have none.

    Raises:
        ModelError: files that are damaged or of an architecture that transformers does not have, or NaN in weights.
        MachineError: the library that quantises is not installed.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    silence()
    kind = AutoModelForSequenceClassification if classes else AutoModelForCausalLM
    numbers = {name: i for i, name in enumerate(classes)}
    head = {"id2label": {i: name for name, i in numbers.items()}, "label2id": numbers} if classes else {}
    config = {}
    if quantise:
        from tunesmith.models.quantise import QuantiseConfig

        config = {"quantization_config": QuantiseConfig(quantise, lost_rank)}
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
                **config,
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"can't be loaded as a causal language model ({first_line(error)})",
            where=str(model.path),
            fix="Check that the folder is whole and that this version of transformers knows its model_type.",
        ) from error
    _refuse_unsound(loaded, report["missing_keys"], classes, model.path)
    grow(loaded, model)
    if quantise:
        gc.collect()
        give_back()  # of the weights as they were before
    return loaded.to(device).eval()


def _refuse_unsound(loaded: PreTrainedModel, lacking: Iterable[str], classes: Sequence[str], path: Path) -> None:
    """Raise where what was loaded is no model to work with: without a head, or with weights missing or not finite."""
    if classes and not hasattr(loaded, "score"):
        raise ModelError(
            f"architecture {loaded.config.model_type} can't be given a head of classes",
            where=str(path),
            fix="Take a decoder whose head transformers calls `score` (Llama, Mistral, Qwen, Gemma, GPT-2 and others).",
        )
    missing = [key for key in lacking if not (classes and key.startswith("score."))]
    if missing:  # transformers would go on with random numbers in their place
        raise ModelError(
            f"lacks {len(missing)} of its weights, such as {min(missing)}",
            where=str(path),
            fix="Fetch the model again; a base without a language model's head can't be used.",
        )
    broken = next((name for name, part in _not_finite(loaded)), None)
    if broken:
        raise ModelError(
            f"has weights that are not finite, such as {broken}",
            where=str(path),
            fix="Fetch the model again, or take one that was saved before it broke.",
        )


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


def _not_finite(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The weights that hold NaN or an infinity."""
    for name, weight in model.named_parameters():
        # The sum first: it takes no memory. Of weights that are all finite it may still overflow.
        if weight.is_floating_point() and not weight.detach().sum().isfinite() and not weight.isfinite().all():
            yield name, weight
    for name, module in model.named_modules():
        if not getattr(module, "finite", True):
            yield f"{name}.weight", module


def load_tuned(model: ResolvedModel, adapter: Path, dtype: torch.dtype, device: str = "cpu", merge: bool = True) -> Any:
    """The base with an adapter: merged into its weights where that can be, or on top of them; or the whole model that
    full training saved in its place.

    Merging is done in float32 and rounded once, so that a bfloat16 base loses no more than it must.

    Raises:
        ModelError: the adapter was made for another base, does not fit this one, or is spoilt.
    """
    import torch
    from peft import PeftModel

    from tunesmith.models import bottleneck, virtual

    classes = classes_of(adapter)
    if not is_adapter(adapter):
        return load_model(replace(model, path=adapter, new_words=()), dtype, device, classes)
    refuse_anothers(model, adapter)
    refuse_spoilt(adapter)
    merge = merge and mergeable(adapter)
    base = load_model(model, torch.float32 if merge else dtype, device, classes)
    if classes:
        base.config.pad_token_id = _head(adapter)["pad_token_id"]
    if (adapter / bottleneck.CONFIG).is_file():
        return bottleneck.load(base, adapter).eval()
    try:
        tuned = PeftModel.from_pretrained(base, str(adapter))
        if not mergeable(adapter):
            tuned = virtual.install(tuned)
        elif merge:
            tuned = tuned.merge_and_unload(safe_merge=True).to(dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"the adapter does not fit the model ({first_line(error)})",
            where=str(adapter),
            fix="Use the base that it was trained on.",
        ) from error
    return tuned.eval()


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds weights for a base, rather than a model."""
    return any((folder / name).is_file() for name in ("adapter_config.json", "bottleneck.json"))


def whole_model(folder: Path) -> Path:
    """A folder with a model of its own.

    Raises:
        ModelError: it holds an adapter.
    """
    if is_adapter(folder):
        raise ModelError(
            "holds an adapter, and a whole model is to be trained",
            where=str(folder),
            fix="Name a run that trained one (adapter full or partial), or set train.adapter to the adapter's kind.",
        )
    return folder


def mergeable(adapter: Path) -> bool:
    """Whether an adapter's weights can become part of its base's; virtual tokens and bottlenecks can't."""
    if (adapter / "bottleneck.json").is_file():
        return False
    return adapter_config(adapter).get("peft_type") not in ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")


def mark_base(adapter: Path, model: ResolvedModel) -> None:
    """Write into an adapter's folder which base it was made for."""
    write_json(adapter / BASE, {"name": model.name, "hub_id": model.hub_id, "identity": model.identity})


def refuse_anothers(model: ResolvedModel, adapter: Path) -> None:
    """Raise if an adapter says that it was made for another base, or lies there as a pickle, which is never loaded."""
    if adapter.is_dir() and (pickles := only_pickles({p.name for p in adapter.iterdir()})):
        raise ModelError(
            f"only has pickle weights ({', '.join(pickles[:3])}), which are never loaded",
            where=str(adapter),
            fix="Where you trust it, load it with PEFT and save it again: save_pretrained writes safetensors.",
        )
    told = read_json(adapter / BASE) if (adapter / BASE).is_file() else {}
    identity = told.get("identity") if isinstance(told, dict) else None
    if identity and identity != model.identity:
        raise ModelError(
            f"was made for another base, {told.get('name')} ({str(identity)[:12]}), "
            f"not for {model.name} ({model.identity[:12]})",
            where=str(adapter),
            fix="Set model.name to that base, or take an adapter of this one.",
        )


def refuse_spoilt(adapter: Path) -> None:
    """Raise if an adapter's weights can't be read, or hold NaN or an infinity."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path in sorted(adapter.glob("*.safetensors")):
        try:
            weights = load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"can't be read, as if it were cut short ({first_line(error)})",
                where=str(path),
                fix="Copy the whole file there, or train it again.",
            ) from error
        broken = next((name for name, weight in weights.items() if not weight.isfinite().all()), None)
        if broken is not None:
            raise ModelError(
                f"has weights that are not finite, such as {broken}",
                where=str(path),
                fix="Train it again, at a lower train.learning_rate, or take another adapter.",
            )
