"""A server that speaks vLLM's protocol and answers by a rule: `python fake_vllm.py MODEL --port N ...`.

The next token is the one after the last (7 -> 8), plus 10 with an adapter; ids beyond 99 begin again at 10.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from typing import Any

from aiohttp import web


def option(name: str) -> str:
    return sys.argv[sys.argv.index(name) + 1]


ADAPTERS: dict[str, str] = {}
SEEN: list[dict[str, Any]] = []
RUNNING = {"streams": 0}


def refusal(status: int, message: str) -> web.Response:
    return web.json_response({"error": {"message": message, "type": "BadRequestError", "code": status}}, status=status)


async def completions(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    SEEN.append(body)
    if body["model"] not in (option("--served-model-name"), *ADAPTERS):
        return refusal(404, f"The model `{body['model']}` does not exist.")
    if body["prompt"][:1] == [66]:
        return refusal(400, "Sixty-six is refused.")
    response = web.StreamResponse(headers={"content-type": "text/event-stream"})
    await response.prepare(request)
    RUNNING["streams"] += 1
    token, finish, count = body["prompt"][-1], None, 0

    async def send(event: dict[str, Any]) -> None:
        await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")

    try:
        while finish is None:
            token = (token + (11 if body["model"] in ADAPTERS else 1) - 10) % 90 + 10
            count += 1
            await asyncio.sleep(0.005)
            stopped = token in body["stop_token_ids"]
            finish = "stop" if stopped else "length" if count >= body["max_tokens"] else None
            choice: dict[str, Any] = {
                "index": 0, "text": "" if stopped else f"<{token}>", "finish_reason": finish, "token_ids": [token],
                "logprobs": None,
            }  # fmt: skip
            if body.get("logprobs") is not None:
                name = f"token_id:{token}"
                top = {name: -0.5, f"token_id:{token + 1}": -1.5}
                choice["logprobs"] = {"tokens": [name], "token_logprobs": [-0.5], "top_logprobs": [top]}
            await send({"id": "cmpl-1", "object": "text_completion", "choices": [choice], "usage": None})
        usage = {"prompt_tokens": len(body["prompt"]), "prompt_tokens_details": {"cached_tokens": 3}}
        await send({"id": "cmpl-1", "object": "text_completion", "choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
    finally:
        RUNNING["streams"] -= 1
    return response


async def load(request: web.Request) -> web.Response:
    body = await request.json()
    if os.environ.get("VLLM_ALLOW_RUNTIME_LORA_UPDATING") != "True":
        return refusal(404, "Not Found")
    if not (Path(body["lora_path"]) / "adapter_config.json").is_file():
        return refusal(400, f"Loading lora {body['lora_name']} failed: No adapter found for {body['lora_path']}")
    ADAPTERS[body["lora_name"]] = body["lora_path"]
    return web.Response(text=f"Success: LoRA adapter '{body['lora_name']}' added successfully.")


async def unload(request: web.Request) -> web.Response:
    del ADAPTERS[(await request.json())["lora_name"]]
    return web.Response(text="Success")


async def told(request: web.Request) -> web.Response:
    return web.json_response({"arguments": sys.argv, "seen": SEEN, "pid": os.getpid(), **RUNNING})


async def health(request: web.Request) -> web.Response:
    return web.Response()


if __name__ == "__main__":
    if "--broken" in sys.argv:
        sys.exit("no room for the model")
    app = web.Application()
    app.add_routes([
        web.get("/health", health), web.get("/told", told), web.post("/v1/completions", completions),
        web.post("/v1/load_lora_adapter", load), web.post("/v1/unload_lora_adapter", unload),
    ])  # fmt: skip
    web.run_app(app, host=option("--host"), port=int(option("--port")), print=None)
