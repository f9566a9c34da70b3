"""The recipe's `package`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tunesmith.section import Section

GgufPrecision = Literal["float32", "float16", "bfloat16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]


class PackageSection(Section):
    """What is handed on."""

    precision: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the merged weights; `auto` is what the base model's own file has, or float32 where rounding
    to that would change the answers."""
    tolerance: float | None = Field(None, gt=0)
    """Largest difference between the merged model's and the adapter's logits, as a share of the logits'
    standard deviation; 0.001 for float32 and 0.3 for 16 bits, if not given."""
    gguf: tuple[GgufPrecision, ...] = ()
    """Also as GGUF files (llama.cpp, Ollama, LM Studio) in these precisions, and a plain LoRA adapter as one."""
    force: bool = False
    """Package what the gate holds, too; the manifest records it."""
    check_rows: int = Field(8, ge=1)
    """How many test rows that is checked on."""
