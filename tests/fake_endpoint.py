"""An OpenAI-compatible endpoint on this machine, with failures on request."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from tests.listening import Listening, Quiet


@dataclass
class FakeEndpoint:
    """`reply` makes the answer of the messages; `fail` gives a status to answer with, or None, from (messages, try);
    `refuse` what is wrong with a request's settings, or None."""

    reply: Callable[[list[dict[str, str]]], str]
    fail: Callable[[list[dict[str, str]], int], int | None] = lambda messages, number: None
    refuse: Callable[[dict[str, Any]], str | None] = lambda body: None
    asked: list[dict[str, Any]] = field(default_factory=list)

    def __enter__(self) -> FakeEndpoint:
        fake = self
        tries: dict[str, int] = {}

        class Handler(Quiet):
            def do_POST(self) -> None:
                body = json.loads(self.read())
                key = json.dumps(body["messages"])
                tries[key] = tries.get(key, 0) + 1
                fake.asked.append(body | {"path": self.path})
                refused = fake.refuse(body)
                status = 400 if refused else fake.fail(body["messages"], tries[key])
                text = fake.reply(body["messages"])
                answer = {
                    "choices": [{"message": {"role": "assistant", "content": text}}],
                    "usage": {"prompt_tokens": 5, "completion_tokens": len(text.split())},
                }
                data = json.dumps(answer if status is None else {"error": {"message": refused or "no"}}).encode()
                self.send(data, status or 200)

        self._server = Listening(Handler)
        return self

    @property
    def url(self) -> str:
        return f"{self._server.url}/v1"

    def __exit__(self, *_: object) -> None:
        self._server.close()
