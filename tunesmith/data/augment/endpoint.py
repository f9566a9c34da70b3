"""Asking an OpenAI-compatible endpoint, every reply kept: what was paid for once is not asked for again."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tunesmith.conversation.message import Message
from tunesmith.data.augment.base import Account
from tunesmith.errors import DataError, first_line
from tunesmith.models.resolve import cache_folder
from tunesmith.progress import bar
from tunesmith.runs import hash_json, write_json

WAITS = (1.0, 4.0, 16.0)  # seconds before each further try
AT_ONCE = 8
PASSING = {408, 409, 429, 500, 502, 503, 504}


def ask(url: str, body: dict[str, Any], prompts: Sequence[Sequence[Message]], account: Account) -> list[str]:
    """The endpoint's answers, in the prompts' order.

    Replies lie in the cache by what was asked, as they come; so a run that was stopped goes on where it was.

    Raises:
        DataError: the endpoint refuses, or fails on every try.
    """
    import httpx2

    folder = cache_folder() / "augment"
    folder.mkdir(parents=True, exist_ok=True)
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    address = os.path.expandvars(url).rstrip("/") + "/chat/completions"

    def one(prompt: Sequence[Message]) -> tuple[dict[str, Any], bool]:
        asked = body | {"messages": [m.for_template() for m in prompt]}
        kept = folder / f"{hash_json([address, asked])}.json"
        try:
            return json.loads(kept.read_text(encoding="utf-8")), True
        except (OSError, ValueError):
            pass
        reply = _posted(client, address, asked)
        write_json(kept, reply)
        return reply, False

    with (
        httpx2.Client(timeout=120, headers=headers) as client,
        ThreadPoolExecutor(AT_ONCE) as pool,
        bar("Asking for rows", len(prompts)) as progress,
    ):
        replies = []
        jobs = [pool.submit(one, prompt) for prompt in prompts]
        try:
            for job in jobs:
                replies.append(job.result())
                progress.advance()
        finally:
            pool.shutdown(cancel_futures=True)
    for reply, earlier in replies:
        for kind in ("prompt", "completion"):
            tokens = int(reply["usage"].get(f"{kind}_tokens") or 0)
            account.tokens[kind] += tokens
            account.tokens["kept"] += tokens if earlier else 0
    return [reply["text"] for reply, _ in replies]


def _posted(client: Any, address: str, body: dict[str, Any]) -> dict[str, Any]:
    import httpx2

    why = ""
    for wait in (0.0, *WAITS):
        time.sleep(wait)
        try:
            response = client.post(address, json=body)
        except httpx2.HTTPError as error:
            why = f"{type(error).__name__}: {first_line(error)}"
            continue
        if response.status_code in PASSING:
            why = f"status {response.status_code}"
            continue
        if response.status_code != 200:
            raise DataError(
                f"the endpoint refuses (status {response.status_code}: {response.text[:200]})",
                where=address,
                fix="Check the model's name, and OPENAI_API_KEY.",
            )
        try:
            found = response.json()
            return {"text": str(found["choices"][0]["message"]["content"] or ""), "usage": found.get("usage") or {}}
        except (ValueError, KeyError, IndexError, TypeError):
            why = "an answer that is no chat completion"
    raise DataError(
        f"the endpoint gave no answer, {len(WAITS) + 1} tries ({why})",
        where=address,
        fix="Run again: what came so far is kept.",
    )
