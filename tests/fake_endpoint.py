"""An OpenAI-compatible endpoint on this machine, with failures on request."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


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

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
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
                self.send_response(status or 200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
