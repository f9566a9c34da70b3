"""An OpenAI-compatible endpoint: to evaluate, to judge, to make rows. What fails after retries is told."""

from __future__ import annotations

import json
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any
from urllib.parse import urlsplit

from tunesmith.errors import ModelError
from tunesmith.inference.engine import Sampling, Score, Tick
from tunesmith.inference.subject import Ask, Reply, Row
from tunesmith.progress import say

WAITS = (0.5, 1.0, 2.0, 4.0)  # seconds before each further try
AT_ONCE = 8
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
# What some models refuse to be told, and how they say so.
TOLD = re.compile(r"\b(max_tokens|temperature|seed)\b")
REFUSING = re.compile(r"unsupported|not support|unknown|unrecogni[sz]ed|unexpected|not permitted|not allowed", re.I)


def is_endpoint(name: str) -> bool:
    return name.startswith(("http://", "https://"))


def about_tokens(text: str) -> int:
    """A text's length where the tokenizer is not known: English has about four bytes a token."""
    return len(text.encode()) // 3 + 1


def _completion(found: Any) -> tuple[str, dict[str, int]]:
    """A chat completion's text (its calls as JSON, where it has no other) and the tokens that it counts.

    Raises:
        KeyError, TypeError, ...: it is none.
    """
    message, used = found["choices"][0]["message"], found.get("usage") or {}
    called = [call["function"] for call in message.get("tool_calls") or ()]
    text = message.get("content") or (json.dumps(called, ensure_ascii=False) if called else "")
    if isinstance(text, list):  # parts, as some send them
        text = "".join(part["text"] for part in text if part["type"] == "text")
    if not isinstance(text, str):
        raise TypeError("content is no text")
    text = text.encode("utf-8", "replace").decode()  # half a character, where an answer was cut, can't be written down
    return text, {kind: int(used.get(kind) or 0) for kind in ("prompt_tokens", "completion_tokens")}


class Endpoint:
    """A model behind `URL#MODEL`, where URL ends before /chat/completions and may hold ${VARIABLES}. Its key is
    OPENAI_API_KEY, if that is set.

    Attributes:
        usage: tokens that the endpoint has counted: prompt and completion.

    Raises:
        ModelError: the address names no model, or the endpoint lets nobody in.
    """

    def __init__(self, name: str, timeout: float = 120.0) -> None:
        address, _, model = os.path.expandvars(name).partition("#")
        try:
            parts = urlsplit(address)
            whole = bool(parts.hostname) and parts.port != 0  # a port that is none raises
        except ValueError as error:
            fix = "Write it as https://host/v1#model-name."
            raise ModelError(f"is no address ({error})", where=name, fix=fix) from None
        if not model or not whole:
            raise ModelError("names no model", where=name, fix="Write it as https://host/v1#model-name.")
        self.name, self.model, self._timeout = name, model, timeout
        self._url = address.rstrip("/") + "/chat/completions"
        self.usage = {"prompt_tokens": 0, "completion_tokens": 0}
        self._refused: set[str] = set()

    def answers(
        self, prompts: Sequence[Ask], limit: int, sampling: Sampling | None, tick: Tick
    ) -> Iterator[tuple[int, Reply]]:
        import httpx2

        key = os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with httpx2.Client(timeout=self._timeout, headers=headers) as client, ThreadPoolExecutor(AT_ONCE) as pool:
            jobs = {pool.submit(self._asked, client, prompt, limit, sampling): i for i, prompt in enumerate(prompts)}
            try:
                for job in as_completed(jobs):
                    reply = job.result()
                    tick(1)
                    yield jobs[job], reply
            finally:
                pool.shutdown(cancel_futures=True)

    def likelihoods(self, rows: Sequence[Row], tick: Tick) -> Iterator[tuple[int, Score]]:
        raise ModelError("gives no likelihoods", where=self.name, fix="Leave out what needs them, such as loss.")

    def _asked(self, client: Any, prompt: Ask, limit: int, sampling: Sampling | None) -> Reply:
        import httpx2

        why, asked_to_wait = "", 0.0
        for wait in (0.0, *WAITS):
            time.sleep(max(wait * (0.75 + random.random() / 2), asked_to_wait))
            started, body = time.perf_counter(), self._body(prompt, limit, sampling)
            try:
                response = client.post(self._url, json=body)
            except httpx2.HTTPError as error:
                why = f"{type(error).__name__}: {error}"
                continue
            if response.status_code in (401, 403):
                raise ModelError(
                    f"the endpoint lets nobody in ({response.status_code})",
                    where=self._url,
                    fix="Set OPENAI_API_KEY to its key.",
                )
            if response.status_code in PASSING:
                why = f"status {response.status_code}"
                after = response.headers.get("retry-after", "")
                asked_to_wait = min(float(after), 60.0) if re.fullmatch(r"\d+(\.\d+)?", after, re.ASCII) else 0.0
                continue
            if response.status_code in (400, 422) and self._refuses(response.text, body):
                why = f"status {response.status_code}: {response.text[:200]}"
                continue
            if response.status_code != 200:
                return Reply("", failure=f"status {response.status_code}: {response.text[:200]}")
            try:
                text, used = _completion(response.json())
            except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RecursionError):
                why = "an answer that is not a chat completion"
                continue
            for kind in self.usage:
                self.usage[kind] += used[kind]
            read, written = (used[kind] for kind in self.usage)
            return Reply(text, written, time.perf_counter() - started, read=read)
        return Reply("", failure=f"{why} ({len(WAITS) + 1} times)")

    def _body(self, prompt: Ask, limit: int, sampling: Sampling | None) -> dict[str, Any]:
        """A request, without what the model has refused to be told."""
        told: dict[str, Any] = {"max_tokens": limit, "temperature": sampling.temperature if sampling else 0}
        told |= {"seed": sampling.seed} if sampling else {}
        if "max_tokens" in self._refused:
            told["max_completion_tokens"] = limit
        kept = {key: value for key, value in told.items() if key not in self._refused}
        body = {"model": self.model, "messages": [m.for_template() for m in prompt.messages]} | kept
        return body | ({"tools": list(prompt.tools)} if prompt.tools else {})

    def _refuses(self, text: str, body: dict[str, Any]) -> bool:
        """Whether an error is about a setting that can be left out; it then is from now on."""
        named = TOLD.search(text) if REFUSING.search(text) else None
        if named is None or named[1] not in body:
            return False
        if named[1] not in self._refused:
            self._refused.add(named[1])
            instead = "max_completion_tokens is sent instead" if named[1] == "max_tokens" else "it is left out"
            say(f"{self.model} takes no {named[1]}: {instead}")
        return True
