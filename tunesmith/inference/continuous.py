"""Continuous batching: requests join between steps, read their prompts in pieces, and leave when they are answered."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.errors import first_line
from tunesmith.inference.chooser import Chooser, matcher
from tunesmith.inference.letters import Spelling, Words
from tunesmith.inference.rows import Apart, Prompt, Rows
from tunesmith.inference.served import Request
from tunesmith.models.loras import Loras

READ_TOKENS = 512  # of a prompt between two steps of the others
FAILED = "failed"


class Answer:
    """A request on its way."""

    def __init__(self, number: int, request: Request, chooser: Chooser, spelling: Spelling) -> None:
        self.number, self.request, self.chooser, self.spelling = number, request, chooser, spelling
        self.given = 0
        self.token = 0
        self.cached = 0


class Continuous:
    """Answers many requests with one model.

    Args:
        tokenizer: transformers' own, of the fast kind.
        tell: gets each step's pieces, as [number, text, ids, log-probabilities, finish, cached tokens]; one that
            can't be answered ends with the finish FAILED, and why as its text.
        grammars: makes an llguidance tokenizer when the first schema comes.
        virtual: ids that every prompt begins with.
    """

    def __init__(
        self,
        rows: Rows | Apart,
        loras: Loras,
        tokenizer: Any,
        tell: Callable[[list[list[Any]]], None],
        grammars: Callable[[], Any],
        virtual: list[int],
    ) -> None:
        self.rows, self.loras, self._tokenizer, self._tell = rows, loras, tokenizer, tell
        self._words = Words(tokenizer.backend_tokenizer)
        self._grammars, self._virtual = grammars, virtual
        self._waiting: deque[Answer] = deque()
        self._reading: tuple[Answer, Prompt] | None = None
        self._alive: list[Answer] = []
        self._pieces: list[list[Any]] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._reading or self._alive)

    def ask(self, number: int, request: Request) -> None:
        grammar = None if request.grammar is None else matcher(self._grammars(), request.grammar)
        spelling = Spelling(self._tokenizer, request.stop)
        self._waiting.append(Answer(number, request, Chooser(request, grammar), spelling))

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Forget a request; its row is free at once."""
        self._waiting = deque(a for a in self._waiting if a.number != number)
        if self._reading and self._reading[0].number == number:
            self._reading = None
        for row, answer in enumerate(self._alive):
            if answer.number == number:
                self._leave(row)
                return

    def using(self, adapter: str) -> bool:
        """Whether somebody is answered with an adapter."""
        answers = [*self._waiting, *self._alive, *([self._reading[0]] if self._reading else [])]
        return any(answer.request.adapter == adapter for answer in answers)

    @torch.inference_mode()
    def load(self, name: str, folder: Path) -> None:
        self.rows.forget(name)
        self.loras.add(name, folder)

    @torch.inference_mode()
    def unload(self, name: str) -> None:
        self.loras.remove(name)
        self.rows.forget(name)

    @torch.inference_mode()
    def turn(self) -> None:
        """Read some of a prompt, and give everybody a token."""
        budget = READ_TOKENS
        while budget > 0 and (self._reading or (self._waiting and len(self._alive) < self.rows.slots)):
            if not self._reading:
                answer = self._waiting.popleft()
                prompt = self.rows.begin(self._virtual + answer.request.prompt, answer.request.adapter)
                answer.cached = prompt.cached
                self._reading = (answer, prompt)
            answer, prompt = self._reading
            try:
                budget -= self._read(answer, prompt, budget)
            except torch.AcceleratorError:  # nothing can be computed any more
                raise
            except Exception as error:
                self._reading = None
                self._fail(answer, error)
        if self._alive:
            spare = self.rows.padded(len(self._alive)) - len(self._alive)
            self.loras.choose([answer.request.adapter for answer in self._alive] + [None] * spare)
            self._chosen(self.rows.step([answer.token for answer in self._alive]), self._alive)
        if self._pieces:
            self._tell(self._pieces)
            self._pieces = []

    @torch.inference_mode()
    def embed(self, prompt: list[int]) -> list[float]:
        """The mean of the last layer's outputs, of length 1."""
        self.loras.choose([None])
        mean = self.rows.hidden(self._virtual + prompt).float().mean(0)
        found: list[float] = (mean / mean.norm()).tolist()
        return found

    @torch.inference_mode()
    def read_back(self, prompt: list[int], adapter: str | None, top: int) -> list[Any]:
        """Each token of a prompt as `_logprob` tells it, with NaN for the first."""
        self.loras.choose([adapter])
        first = prompt[0]
        found: list[Any] = [[first, self._letters(first), float("nan"), []]]
        place = len(self._virtual)
        for logits_NV in self.rows.scores(self._virtual + prompt):
            told_NV = logits_NV.float().log_softmax(-1)
            for told_V in told_NV:
                if place >= len(self._virtual) and len(found) < len(prompt):
                    found.append(self._logprob(prompt[len(found)], told_V, top))
                place += 1
        return found

    def _read(self, answer: Answer, prompt: Prompt, count: int) -> int:
        """Read up to so many of a prompt's tokens; how many it were."""
        self.loras.choose([answer.request.adapter])
        before = prompt.read
        logits = self.rows.read(prompt, count)
        if prompt.whole:
            self._reading = None
            self.rows.join(prompt)
            self._alive.append(answer)
            self._chosen(logits[None], [answer])
        return prompt.read - before

    def _chosen(self, logits_BV: Tensor, answers: list[Answer]) -> None:
        """Take each row's next token, and let those go that have ended."""
        likeliest = logits_BV.argmax(-1).tolist()
        ended = []
        for row, answer in enumerate(answers):
            try:
                if self._next(answer, logits_BV[row], likeliest[row]):
                    ended.append(answer)
            except Exception as error:
                self._fail(answer, error)
                ended.append(answer)
        for answer in ended:
            self._leave(self._alive.index(answer))

    def _next(self, answer: Answer, logits_V: Tensor, likeliest: int) -> bool:
        """Choose and tell an answer's next token, and whether it was the last."""
        told = logits_V.float().log_softmax(-1) if answer.request.top_logprobs is not None else None
        plain = answer.chooser.plain
        token = likeliest if plain else answer.chooser.choose(logits_V.to("cpu", torch.float32, copy=True))
        return self._ended(answer, token, told)

    def _fail(self, answer: Answer, error: Exception) -> None:
        """Tell the one who asked; the others are answered on."""
        self._pieces.append([answer.number, f"{type(error).__name__}: {first_line(error)}", [], [], FAILED, 0])

    def _ended(self, answer: Answer, token: int, told: Tensor | None) -> bool:
        """Tell a token, and whether it was the last."""
        request = answer.request
        answer.token = token
        answer.given += 1
        finish: str | None = None
        ids: list[int] = []
        logprobs: list[Any] = []
        if token in request.stop_ids:
            finish, text = "stop", answer.spelling.rest()
        else:
            text, ids = answer.spelling.add(token), [token]
            logprobs = [self._logprob(token, told, request.top_logprobs or 0)] if told is not None else []
            if answer.spelling.stopped or answer.chooser.finished:
                finish = "stop"
            elif answer.given >= request.max_new_tokens:
                finish = "length"
            if finish:
                text += answer.spelling.rest()
        self._pieces.append([answer.number, text, ids, logprobs, finish, answer.cached])
        return finish is not None

    def _logprob(self, token: int, told: Tensor, count: int) -> list[Any]:
        values, ids = told.topk(count) if count else (told[:0], told[:0].long())
        top = [[i, self._letters(i), value] for i, value in zip(ids.tolist(), values.tolist(), strict=True)]
        return [token, self._letters(token), told[token].item(), top]

    def _letters(self, token: int) -> str:
        return self._words.data(token).decode("latin-1")

    def _leave(self, row: int) -> None:
        self.rows.leave(row)
        last = self._alive.pop()
        if row < len(self._alive):
            self._alive[row] = last
