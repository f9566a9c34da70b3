"""The package stage: adapter + base -> one model folder that plain transformers loads, checked against them.

Where the adapter can't be merged, the folder holds the base, and the adapter in a folder of its own inside."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import GenerationConfig

from tunesmith.conversation.message import Conversation
from tunesmith.conversation.render import Renderer
from tunesmith.errors import ModelError
from tunesmith.models import bottleneck, gguf_file
from tunesmith.models.arrays import is_plain_lora
from tunesmith.models.load import classes_of, is_adapter, load_model, load_tuned, mergeable
from tunesmith.models.resolve import ResolvedModel
from tunesmith.package.section import PackageSection
from tunesmith.progress import bar, say
from tunesmith.runs import need_room

GGUF = "gguf"  # where GGUF files lie, beside the model's folder
ADAPTER = "adapter"  # where an adapter lies that can't be merged
CHECKED_TOKENS = 256
# Largest difference of a logit as a share of the logits' spread, and mean KL divergence in nats. Rounding weights
# to 16 bits moves single logits by tenths of the spread; a wrong merge moves the distribution.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3, "float16": 0.3}
TOLERATED_KL = {"float32": 1e-5, "bfloat16": 0.01, "float16": 0.01}


@dataclass(frozen=True)
class PackageInputs:
    """The base, the adapter on it, and rows to compare on."""

    model: ResolvedModel
    adapter: Path
    renderer: Renderer
    rows: Sequence[Conversation]


def package(section: PackageSection, inputs: PackageInputs, target: Path) -> dict[str, Any]:
    """Write the model into `target/model`; returns the check's figures, and whether it is merged, for the manifest.

    Raises:
        ModelError: merged and adapter give logits further apart than the tolerance.
    """
    if section.gguf:
        _check_gguf(inputs)
    stored = stored_precision(inputs.model.path)
    size = sum(p.stat().st_size for p in inputs.model.path.glob("*.safetensors"))
    need_room(target, 4 * size, "The merged model")
    check = _merge(section, inputs, target / "model", stored if section.precision == "auto" else section.precision)
    if section.precision == "auto" and stored != "float32" and not _near(check):
        say(f"rounding the merged weights to {stored} would change the answers: keeping them in float32")
        check = _merge(section, inputs, target / "model", "float32") | {"instead_of": stored}
    if not _near(check):
        raise ModelError(
            f"merged and adapter differ by {check['largest_difference']:.3g} of the logits' spread "
            f"({check['tolerance']:g} is allowed) and {check['mean_kl']:.3g} nats of KL "
            f"({check['tolerated_kl']:g} is allowed)",
            where="package.tolerance",
            fix="Merge in float32 (package.precision: float32), or ship the adapter beside its base.",
        )
    files = {"gguf": _gguf(section, inputs, target)} if section.gguf else {}
    return {"check": check, "merged": merges(inputs.adapter), **files}


def _check_gguf(inputs: PackageInputs) -> None:
    gguf_file.check(inputs.model.path)
    if not merges(inputs.adapter) or classes_of(inputs.adapter):
        raise ModelError(
            "what was trained can't be merged into the model, so one GGUF file can't hold it",
            where="package.gguf",
            fix="Leave package.gguf out, or train with adapter lora.",
        )


def _gguf(section: PackageSection, inputs: PackageInputs, target: Path) -> list[str]:
    """Write the merged model in each precision, and the adapter where it is plain LoRA; returns the files' names."""
    folder, source = target / GGUF, inputs.adapter
    folder.mkdir()
    written = []
    with bar("Writing GGUF files", len(section.gguf)) as progress:
        for precision in section.gguf:
            written.append(f"model-{precision}.gguf")
            gguf_file.write_model(target / "model", folder / written[-1], precision, inputs.model.name)
            progress.advance()
    if is_adapter(source) and is_plain_lora(source):
        written.append("adapter.gguf")
        gguf_file.write_adapter(source, inputs.model.path, folder / written[-1])
    return written


def loading(folder: Path) -> str | None:
    """Code that puts a package's adapter on its loaded `model`; None where what was trained is part of it."""
    if not (folder / ADAPTER).is_dir():
        return None
    if (folder / ADAPTER / bottleneck.CONFIG).is_file():
        return f'from tunesmith.models import bottleneck\n\nmodel = bottleneck.load(model, name + "/{ADAPTER}")\n'
    return f'from peft import PeftModel\n\nmodel = PeftModel.from_pretrained(model, name + "/{ADAPTER}")\n'


def merges(adapter: Path) -> bool:
    """Whether what was trained becomes one model, without an adapter beside it."""
    return not is_adapter(adapter) or mergeable(adapter)


def _near(check: dict[str, Any]) -> bool:
    return bool(check["largest_difference"] <= check["tolerance"] and check["mean_kl"] <= check["tolerated_kl"])


def _merge(section: PackageSection, inputs: PackageInputs, folder: Path, precision: str) -> dict[str, Any]:
    """Write the merged model in `precision` and compare it with base and adapter."""
    rows = [inputs.renderer.render(row).ids[:CHECKED_TOKENS] for row in inputs.rows[: section.check_rows]]
    with bar("Merging and checking", 2) as progress:
        if merges(inputs.adapter):
            merged = load_tuned(inputs.model, inputs.adapter, getattr(torch, precision))
        else:
            merged = load_model(inputs.model, getattr(torch, precision), classes=classes_of(inputs.adapter))
            shutil.copytree(inputs.adapter, folder / ADAPTER)
        merged.save_pretrained(folder)
        tokenizer = copy.deepcopy(inputs.renderer.tokenizer)
        if classes_of(inputs.adapter) and merged.config.pad_token_id is not None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(merged.config.pad_token_id)
        tokenizer.chat_template = inputs.renderer.template
        tokenizer.save_pretrained(folder)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=inputs.renderer.stop_ids,
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else inputs.renderer.stop_ids[0],
            do_sample=False,
        ).save_pretrained(folder)
        del merged
        progress.advance()
        found = compare(
            load_tuned(inputs.model, inputs.adapter, torch.float32, merge=False),
            _packaged(replace(inputs.model, path=folder), classes_of(inputs.adapter)),
            rows,
        )
        progress.advance()
    tolerance = section.tolerance or TOLERANCE[precision]
    return found | {"precision": precision, "tolerance": tolerance, "tolerated_kl": TOLERATED_KL[precision]}


def _packaged(model: ResolvedModel, classes: Sequence[str]) -> Any:
    """What the package's user will load."""
    adapter = model.path / ADAPTER
    if adapter.is_dir():
        return load_tuned(model, adapter, torch.float32)
    return load_model(model, torch.float32, classes=classes)


def stored_precision(folder: Path) -> str:
    """The type of most weights in a model's files, as torch names it."""
    names = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors handle is not a mapping)
                found = file.get_slice(key).get_dtype()
                if found in names:
                    return names[found]
    return "float32"


@torch.inference_mode()
def compare(expected: Any, found: Any, rows: Sequence[list[int]]) -> dict[str, Any]:
    """How far two models' logits are apart on the same rows of token ids.

    Gives the largest difference as a share of the expected logits' standard deviation, the mean KL
    divergence in nats, and how often both name the same next token.
    """
    largest = spread = divergence = agree = 0.0
    count = 0
    for ids in rows:
        before, after = (_logits(model, ids) for model in (expected, found))
        largest = max(largest, (before - after).abs().max().item())
        spread += (before.std().item() if before.numel() > 1 else max(before.abs().item(), 1.0)) * len(before)
        p, q = before.log_softmax(-1), after.log_softmax(-1)
        divergence += (p.exp() * (p - q)).sum().item()
        agree += (before.argmax(-1) == after.argmax(-1)).sum().item()
        count += len(before)
    return {
        "largest_difference": largest * count / spread,
        "mean_kl": max(divergence / count, 0.0),  # rounding can leave it a hair below
        "same_next_token": agree / count,
        "tokens": sum(map(len, rows)),
    }


def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    """[T, V] of a row's own tokens; [1, classes] where a head tells one row."""
    whole = getattr(model, "virtual_ids", []) + ids
    found: torch.Tensor = model(input_ids=torch.tensor([whole])).logits[0].float()
    return found[-len(ids) :] if found.dim() == 2 else found[None]
