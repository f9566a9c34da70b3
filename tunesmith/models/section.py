"""The recipe's `model`."""

from __future__ import annotations

from pydantic import Field

from tunesmith.section import Section


class ModelSection(Section):
    """The base model. A plain name stands for `{name: ...}`."""

    name: str = Field(min_length=1)
    """A built-in name (smollm2-135m-instruct), a folder, a .gguf file, or a hub id (owner/name)."""
    revision: str | None = None
    """A hub revision: a branch, tag or commit."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings. Off unless you have read that code."""
    chat_template: str | None = None
    """A Jinja chat template in place of the tokenizer's own."""
    end_of_turn: str | None = None
    """A token that ends an answer, where the tokenizer's end-of-sequence token is another one."""
    new_words: list[str] = Field(default_factory=list)
    """Words that become one token each, such as names of products; their embeddings are trained with the adapter."""
