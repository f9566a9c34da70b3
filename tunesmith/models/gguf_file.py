"""GGUF files of models and of LoRA adapters: what llama.cpp, Ollama and LM Studio read. Written with the `gguf`
package; torch is not needed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunesmith.errors import ModelError
from tunesmith.models.arrays import adapter_config, arrays, scale_of
from tunesmith.models.gguf_rope import add_rope
from tunesmith.models.gguf_vocab import add_vocabulary, check_vocabulary
from tunesmith.models.resolve import cache_folder, folder_hash

if TYPE_CHECKING:
    from gguf import GGUFWriter

Array = np.ndarray[Any, Any]
# By transformers' model_type: GGUF's name, and whether queries and keys are kept in another order there.
ARCHITECTURES = {
    "llama": ("LLAMA", True),
    "mistral": ("LLAMA", True),
    "qwen2": ("QWEN2", False),
    "qwen3": ("QWEN3", False),
}
# Of a recipe's precision: the type of matrices, and of those that are read row by row or end the model.
PRECISIONS = {
    "float32": ("F32", "F32"),
    "float16": ("F16", "F16"),
    "bfloat16": ("BF16", "BF16"),
    "q8_0": ("Q8_0", "Q8_0"),
    "q5_1": ("Q5_1", "Q8_0"),
    "q5_0": ("Q5_0", "Q8_0"),
    "q4_1": ("Q4_1", "Q8_0"),
    "q4_0": ("Q4_0", "Q8_0"),
}
WIDE = ("token_embd.weight", "output.weight")


@dataclass(frozen=True)
class Shape:
    """What a model's config.json says that GGUF needs to know."""

    config: dict[str, Any]
    arch: str
    permuted: bool
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    @classmethod
    def of(cls, folder: Path) -> Shape:
        """
        Raises:
            ModelError: an architecture, or a setting of one, that no GGUF file is written of.
        """
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = config.get("model_type")
        if kind not in ARCHITECTURES:
            raise _unknown(folder, f"model_type {kind}")
        if config.get("hidden_act", "silu") != "silu":
            raise _unknown(folder, f"hidden_act {config['hidden_act']}")
        window = config.get("sliding_window")
        if window and config.get("use_sliding_window", True) and window < config["max_position_embeddings"]:
            raise _unknown(folder, f"sliding_window {window}")
        heads = config["num_attention_heads"]
        arch, permuted = ARCHITECTURES[kind]
        return cls(
            config,
            arch,
            permuted,
            heads,
            config.get("num_key_value_heads") or heads,
            config.get("head_dim") or config["hidden_size"] // heads,
            config["num_hidden_layers"],
        )

    def names(self) -> Any:
        import gguf

        return gguf.get_tensor_name_map(gguf.MODEL_ARCH[self.arch], self.layers)

    def turned(self, name: str, x: Array) -> Array:
        """Rows of queries and keys, from halves that rotate together to neighbours that do, where GGUF has it so."""
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(name.split(".")[-2])
        if not self.permuted or heads is None:
            return x
        return x.reshape(heads, 2, x.shape[0] // heads // 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def write_model(folder: Path, target: Path, precision: str, name: str | None = None) -> None:
    """Write a model folder (config.json, safetensors, tokenizer) as one GGUF file.

    Args:
        precision: a key of PRECISIONS. Matrices whose rows can't be cut into blocks stay in float16; vectors are
            float32 always.

    Raises:
        ModelError: an architecture or tokenizer that is not known here.
    """
    import gguf

    shape = Shape.of(folder)
    config, names = shape.config, shape.names()
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[shape.arch]], use_temp_file=True)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name or folder.name)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(shape.layers)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    kinds = [gguf.GGMLQuantizationType[kind] for kind in PRECISIONS[precision]]
    file_type = "ALL_F32" if precision == "float32" else f"MOSTLY_{kinds[0].name}"
    writer.add_file_type(gguf.LlamaFileType[file_type])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_rope(writer, config, shape.head_dim, folder)
    add_vocabulary(writer, folder, config["vocab_size"], _stops(folder, config))
    tied = bool(config.get("tie_word_embeddings"))
    for key, value in arrays(folder):
        if tied and key == "lm_head.weight":
            continue
        found = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise _unknown(folder, f"a weight called {key}")
        _add(writer, found, shape.turned(key, value), kinds[found in WIDE])
    _close(writer)


def write_adapter(folder: Path, base: Path, target: Path) -> None:
    """Write a PEFT LoRA folder as a GGUF file for the model in the folder `base`, in float32.

    Raises:
        ModelError: it holds more than LoRA's two matrices for weights of this base.
    """
    import gguf

    shape = Shape.of(base)
    names = shape.names()
    about = adapter_config(folder)
    if about.get("peft_type") != "LORA" or about.get("use_dora"):
        raise _unmerged(folder, "DoRA" if about.get("use_dora") else str(about.get("peft_type")))
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[shape.arch]], use_temp_file=True)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, 0.0)  # each B carries its own scale
    for key, module, part, value in _matrices(folder):
        found = names.get_name(module + ".weight", try_suffixes=(".weight",))
        if found is None or found == "token_embd.weight":
            raise _unmerged(folder, f"a weight called {key}")
        if part == "lora_B":
            value = shape.turned(module + ".weight", value) * scale_of(about, module, value.shape[1])
        writer.add_tensor(f"{found}.{part.lower()}", np.ascontiguousarray(value))
    _close(writer)


def check(folder: Path) -> None:
    """Raise ModelError unless a GGUF file can be written of a model folder, as far as its settings tell."""
    Shape.of(folder)
    check_vocabulary(folder)


def model_gguf(path: Path, precision: str) -> Path:
    """A GGUF file of a model folder, made once and kept in the cache; a GGUF file is its own."""
    if path.suffix == ".gguf":
        return path
    return _made(model_place(path, precision), lambda temporary: write_model(path, temporary, precision))


def model_place(path: Path, precision: str) -> Path:
    """Where the cache has it."""
    return cache_folder() / "gguf" / f"{path.name[:40]}-{folder_hash(path)}-{precision}.gguf"


def adapter_gguf(path: Path, base: Path) -> Path:
    """The same of an adapter's folder, for the base whose config.json lies in the folder `base`."""
    if path.suffix == ".gguf":
        return path
    return _made(adapter_place(path), lambda temporary: write_adapter(path, base, temporary))


def adapter_place(path: Path) -> Path:
    """Where the cache has it."""
    return cache_folder() / "gguf" / f"{path.name[:40]}-{folder_hash(path)}-lora.gguf"


def _made(target: Path, write: Any) -> Path:
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.is_file():
            temporary = target.with_name(f".{target.name}.tmp")
            write(temporary)
            temporary.replace(target)
    return target


def _matrices(folder: Path) -> Iterator[tuple[str, str, str, Array]]:
    """A LoRA's keys, the modules that they belong to, lora_A or lora_B, and the values."""
    for key, value in arrays(folder):
        module, _, rest = key.removeprefix("base_model.model.").rpartition(".lora_")
        if rest not in ("A.weight", "B.weight"):
            raise _unmerged(folder, f"a weight called {key}")
        yield key, module, f"lora_{rest[0]}", value


def _add(writer: GGUFWriter, name: str, value: Array, kind: Any) -> None:
    import gguf

    if value.ndim == 1:
        kind = gguf.GGMLQuantizationType.F32
    elif value.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
        kind = gguf.GGMLQuantizationType.F16
    writer.add_tensor(name, gguf.quants.quantize(np.ascontiguousarray(value), kind), raw_dtype=kind)


def _close(writer: GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _stops(folder: Path, config: dict[str, Any]) -> list[int]:
    file = folder / "generation_config.json"
    told = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    found = told.get("eos_token_id", config.get("eos_token_id"))
    return found if isinstance(found, list) else [found] if found is not None else []


def _unknown(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"no GGUF file can be written of a model with {what}",
        where=str(folder),
        fix=f"Known: {', '.join(ARCHITECTURES)}. Serve others with engine: transformers.",
    )


def _unmerged(folder: Path, what: str) -> ModelError:
    return ModelError(
        f"is no plain LoRA adapter of this base: it has {what}",
        where=str(folder),
        fix="Package its run, which merges it, and serve that; or take engine: transformers.",
    )
