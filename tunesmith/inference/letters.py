"""Tokens -> text, as they come: whole letters, held back where a stop text may begin; and each token's bytes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BYTE = re.compile(r"<0x([0-9A-F]{2})>$")


class Words:
    """A tokenizer's tokens as bytes. `tokenizer` is one of the tokenizers library."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._bytes_as_letters = "ByteLevel" in str(tokenizer.decoder)
        self._added = {i: token.content for i, token in tokenizer.get_added_tokens_decoder().items()}

    def data(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        word = self._tokenizer.id_to_token(token)
        if word is None:  # the embedding may have more rows than there are words
            return b""
        if self._bytes_as_letters:
            return bytes(_letters()[letter] for letter in word)
        found = BYTE.match(word)
        return bytes([int(found[1], 16)]) if found else word.replace("▁", " ").encode()


@cache
def _letters() -> dict[str, int]:
    """GPT-2's letters for bytes, backwards."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}


class Spelling:
    """One answer's text.

    Attributes:
        stopped: whether one of the stop texts has come; nothing follows then.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str]) -> None:
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._from = self._read = 0  # ids that are decoded anew with the next one, and those whose text is out
        self._held = ""
        self.stopped = False

    def add(self, token: int) -> str:
        """What can be told now."""
        self._ids.append(token)
        before = self._decoded(self._ids[self._from : self._read])
        now = self._decoded(self._ids[self._from :])
        if now.endswith("\ufffd") and len(self._ids) - self._read < 5:  # a part of a letter: wait for the rest
            return ""
        self._from, self._read = self._read, len(self._ids)
        return self._told(self._held + now[len(before) :])

    def rest(self) -> str:
        """What was held back, at the end."""
        tail = self._decoded(self._ids[self._from :])[len(self._decoded(self._ids[self._from : self._read])) :]
        text, self._held = self._held + tail, ""
        return "" if self.stopped else text

    def _told(self, text: str) -> str:
        ends = [at for at in (text.find(stop) for stop in self._stops) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _decoded(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text


def _overlap(text: str, stop: str) -> int:
    """How many letters at a text's end are a stop text's beginning."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
