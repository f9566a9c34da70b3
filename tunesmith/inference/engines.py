"""The recipe's side of serving engines: what each can be told, and how one is chosen. Light: a model's libraries are
imported where an engine is built."""

from __future__ import annotations

import importlib.util
import logging
import os
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from tunesmith.errors import MachineError, ModelError
from tunesmith.section import Section

if TYPE_CHECKING:
    from tunesmith.inference.served import ServingEngine
    from tunesmith.models.resolve import ResolvedModel

log = logging.getLogger("tunesmith.engine")
USUAL_CONTEXT = 4096


class EngineSection(Section):
    """What every engine can be told."""

    slots: int = Field(8, ge=1, le=256)
    """Requests that are answered at once; further ones wait."""
    queue: int = Field(64, ge=0)
    """Requests that may wait; beyond them a request is refused at once."""
    context: int | None = Field(None, ge=64)
    """Tokens that a prompt and its answer may have together; the model's own length, but at most 4096, if not given.
    Keys and values take memory for `slots` times as many."""

    def tokens(self, model: ResolvedModel) -> int:
        """The context, in tokens.

        Raises:
            ModelError: more was asked for than the model can read.
        """
        from tunesmith.models.load import context_length

        longest = context_length(model)
        if self.context and longest and self.context > longest:
            raise ModelError(
                f"the model reads {longest} tokens at most, and {self.context} were asked for",
                where="engine.context",
                fix=f"Give at most {longest}.",
            )
        return self.context or min(longest or USUAL_CONTEXT, USUAL_CONTEXT)

    @abstractmethod
    def build(self, name: str, model: ResolvedModel) -> ServingEngine:
        """An engine for a model, not started yet. `name` is for messages."""


class Auto(EngineSection):
    """`vllm` where a CUDA device and vLLM are there; else `llamacpp` where its library is installed and a GGUF file can
    be written of the model; else `transformers`."""

    kind: Literal["auto"] = "auto"

    def build(self, name: str, model: ResolvedModel) -> ServingEngine:
        section, why = self.chosen(model)
        log.info("engine of '%s': %s, since %s", name, section.kind, why)
        return section.build(name, model)

    def chosen(self, model: ResolvedModel) -> tuple[LlamaCpp | Transformers | Vllm, str]:
        """The engine's section, and why."""
        shared = self.model_dump(exclude={"kind"})
        if importlib.util.find_spec("vllm") and _cuda():
            return Vllm(**shared), "a CUDA device and vLLM are there"
        if _cuda():
            return Transformers(**shared), "there is a CUDA device and no vLLM"
        if not importlib.util.find_spec("xllamacpp"):
            return Transformers(**shared), "llama.cpp is not installed"
        from tunesmith.models.gguf_file import check

        try:
            check(model.path)
        except ModelError as error:
            return Transformers(**shared), error.what
        return LlamaCpp(**shared), "this machine has no CUDA device and llama.cpp knows the model"


class LlamaCpp(EngineSection):
    """llama.cpp, embedded: quick on CPUs."""

    kind: Literal["llamacpp"] = "llamacpp"
    precision: Literal["auto", "float32", "float16", "bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"] = "auto"
    """Of the weights; `auto` is what a GGUF file has, and q8_0 for other models. Answers are those of `tunesmith chat`
    token by token in float32."""
    threads: int | None = Field(None, ge=1)
    """One for each core, if not given."""
    draft: str | None = None
    """A smaller model of the same vocabulary, which proposes tokens that the model then accepts or not; answers stay
    the same."""
    draft_tokens: int = Field(8, ge=1, le=64)
    """How many it proposes at most."""

    def build(self, name: str, model: ResolvedModel) -> ServingEngine:
        try:
            from tunesmith.inference.llamacpp import LlamaCppEngine, Settings
        except ImportError as error:
            raise _missing("aiohttp", "llamacpp") from error
        if not importlib.util.find_spec("xllamacpp"):
            raise _missing("xllamacpp", "llamacpp")
        from tunesmith.models.gguf_file import check

        file = None if self.precision != "auto" or model.new_words else _gguf_of(model)
        if file is None:
            check(model.path)
        draft = _resolved(self.draft) if self.draft else None
        settings = Settings(
            model=file or model.path,
            base=model,
            precision="q8_0" if self.precision == "auto" else self.precision,
            context=self.tokens(model),
            slots=self.slots,
            threads=self.threads or _cores(),
            queue=self.queue,
            draft=(_gguf_of(draft) or draft.path) if draft else None,
            draft_tokens=self.draft_tokens,
        )
        return LlamaCppEngine(name, settings)


class Transformers(EngineSection):
    """transformers' models with batched decoding of our own: any model that can be trained, several adapters in one
    batch."""

    kind: Literal["transformers"] = "transformers"
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; `auto` is what is quicker on this machine."""
    prefix_mb: int = Field(256, ge=0)
    """MiB for keys and values of earlier prompts, whose beginnings are not read again."""

    def build(self, name: str, model: ResolvedModel) -> ServingEngine:
        from tunesmith.inference.transformers_serving import TransformersServing

        return TransformersServing(name, model, self)


class Vllm(EngineSection):
    """A vLLM server, started and watched; or one that runs already."""

    kind: Literal["vllm"] = "vllm"
    command: tuple[str, ...] = ("vllm", "serve")
    """What starts it."""
    url: str | None = None
    """A server that runs already (http://host:8000) in place of one that is started: vLLM, or any OpenAI-compatible
    one whose /v1/completions takes token ids and whose tokenizer is this model's."""
    model: str | None = None
    """The model's name at `url`."""
    arguments: tuple[str, ...] = ()
    """Further arguments of `vllm serve`."""
    max_loras: int = Field(8, ge=1)
    """Adapters that may be in one batch."""
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256] = 64
    """Largest rank of an adapter."""

    def build(self, name: str, model: ResolvedModel) -> ServingEngine:
        from tunesmith.inference.vllm import VllmEngine

        return VllmEngine(name, model, self)


def _gguf_of(model: ResolvedModel) -> Path | None:
    """The GGUF file that a model came as."""
    if model.source == "gguf":
        return Path(model.name).expanduser()
    if model.source == "embedded":
        from tunesmith.models.catalogue import EMBEDDED

        return EMBEDDED[model.name].path(model.name)
    return None


def _resolved(name: str) -> ResolvedModel:
    from tunesmith.models.resolve import resolve
    from tunesmith.models.section import ModelSection

    return resolve(ModelSection(name=name))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cuda() -> bool:
    """Whether there is a CUDA device; found without loading torch."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()


def _missing(library: str, kind: str) -> MachineError:
    return MachineError(
        f"{library} is not installed", where=f"engine: {kind}", fix="Install it: pip install 'tunesmith[serve]'"
    )
