"""The next token of a row, of its scores: grammar, bias, penalties, temperature, top-p, a draw."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.inference.served import Request


class Chooser:
    """Chooses one answer's tokens.

    Args:
        grammar: an LLMatcher, where the answer must fulfil a schema.
    """

    def __init__(self, request: Request, grammar: Any = None) -> None:
        self.request, self._grammar = request, grammar
        self._counts: Counter[int] = Counter()
        self._bias = torch.tensor(list(request.logit_bias.values()))
        self._biased = torch.tensor(list(request.logit_bias), dtype=torch.long)
        self._source = torch.Generator()
        if request.seed is None:
            self._source.seed()
        else:
            self._source.manual_seed(request.seed)
        self._penalised = bool(request.presence_penalty or request.frequency_penalty)

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is always the one."""
        changed = self._grammar is not None or self._penalised or len(self._biased)
        return not changed and self.request.temperature == 0

    @property
    def finished(self) -> bool:
        """Whether the grammar lets nothing follow."""
        return self._grammar is not None and bool(self._grammar.is_stopped())

    def choose(self, logits_V: Tensor) -> int:
        """One token. `logits_V` are changed."""
        asked = self.request
        if len(self._biased):
            logits_V[self._biased] += self._bias.to(logits_V.dtype)
        if self._counts and self._penalised:
            ids = torch.tensor(list(self._counts))
            times = torch.tensor(list(self._counts.values()), dtype=logits_V.dtype)
            logits_V[ids] -= asked.presence_penalty + asked.frequency_penalty * times
        if self._grammar is not None:
            self._mask(logits_V)
        token = int(logits_V.argmax()) if asked.temperature == 0 else self._drawn(logits_V)
        self._counts[token] += 1
        if self._grammar is not None:
            self._grammar.consume_token(token)
        return token

    def _drawn(self, logits_V: Tensor) -> int:
        """By temperature, among the likeliest tokens that together have `top_p` (Holtzman et al. 2020)."""
        chances = torch.softmax(logits_V / self.request.temperature, -1)
        if self.request.top_p < 1:
            ordered, ids = chances.sort(descending=True)
            beyond = ordered.cumsum(-1) - ordered >= self.request.top_p
            beyond[0] = False
            chances[ids[beyond]] = 0
        return int(torch.multinomial(chances, 1, generator=self._source))

    def _mask(self, logits_V: Tensor) -> None:
        bits = np.frombuffer(self._grammar.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(bits, bitorder="little")[: len(logits_V)].astype(bool)
        logits_V[~torch.from_numpy(allowed)] = -torch.inf


def matcher(tokenizer: Any, schema: dict[str, Any]) -> Any:
    """What holds an answer to a schema, for an llguidance tokenizer."""
    from llguidance import LLMatcher

    return LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(json.dumps(schema)))
