"""The process that holds llama.cpp: its own server, inside Python (xllamacpp), on a socket of ours."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tunesmith.errors import MachineError, ModelError
from tunesmith.inference.host import Wire
from tunesmith.models.gguf_file import adapter_gguf, model_gguf

WARNINGS = 2  # of llama.cpp's levels


def main() -> None:
    wire = Wire()
    messages = wire.told()
    try:
        address, server = serve(next(messages))
    except Exception as error:
        wire.refuse(error)
        return
    wire.tell(ready={"socket": address})
    for _ in messages:  # none: this waits until the parent has gone
        pass
    os._exit(0)  # requests that are still answered have nobody to read them; the server's own end would wait
    del server


def serve(told: dict[str, Any]) -> tuple[str, Any]:
    """The socket's path, and the server, which lives as long as it is referred to.

    Raises:
        MachineError: xllamacpp is not installed.
        ModelError: a file that llama.cpp can't use.
    """
    try:
        import xllamacpp
    except ImportError as error:
        raise MachineError(
            "llama.cpp is not installed", where="engine: llamacpp", fix="pip install 'tunesmith[serve]'"
        ) from error
    params = xllamacpp.CommonParams()
    params.model.path = str(model_gguf(Path(told["model"]), told["precision"]))
    params.hostnames = [f"{told['folder']}/llama.sock"]
    params.n_parallel, params.n_ctx = told["slots"], told["slots"] * told["context"]
    params.kv_unified = False  # every place has its own keys and values: a row attends to nothing but itself
    params.cache_ram_mib = 0  # its store of prompts forgets which adapter made them; places are chosen by us
    params.cache_idle_slots = False
    params.fit_params = False
    if told["precision"] == "float32":  # keys, values and products of attention too
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = told["threads"]
    params.verbosity = WARNINGS
    params.ui = params.enable_chat_template = params.use_jinja = params.warmup = False
    params.lora_adapters = [_adapter(xllamacpp, Path(path), Path(told["base"])) for path in told["adapters"]]
    if told["embeddings"]:
        params.embedding, params.n_parallel, params.n_ctx = True, 1, told["context"]
        params.n_batch = params.n_ubatch = told["context"]
        params.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    if told["draft"]:
        params.speculative.types = [xllamacpp.common_speculative_type.COMMON_SPECULATIVE_TYPE_DRAFT_SIMPLE]
        params.speculative.draft.mparams.path = str(model_gguf(Path(told["draft"]), told["precision"]))
        params.speculative.draft.n_max = told["draft_tokens"]
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise ModelError(
            "llama.cpp can't load it",
            where=params.model.path,
            fix="Its last lines say why; engine: transformers takes any model that can be trained.",
        ) from error
    return params.hostnames[0], server


def _adapter(xllamacpp: Any, folder: Path, base: Path) -> Any:
    found = xllamacpp.CommonAdapterLoraInfo()
    found.path, found.scale = str(adapter_gguf(folder, base)), 0.0  # each request names the one that it wants
    return found


if __name__ == "__main__":
    main()
