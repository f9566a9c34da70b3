"""What the API itself costs: requests to the real server, in a process of its own, over an engine that answers at once.

    python benchmarks/serving_api.py [--requests 1000] [--tokens 1] [--json FILE]

Beside it stands the same server with a route that answers at once, so that what the client and the socket take can be
told from what the API adds. `cpu_ms` is the server's processor time a request: it does not depend on what else runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import psutil

SERVER = """
import sys
sys.path.insert(0, {root!r})
import uvicorn
from tests.scripted import scripted, state_of
from tunesmith.api.app import build

engine = scripted("word " * {tokens}, slots=64, queue=1000, context=4096)
app = build(state_of(engine))

@app.post("/bare")
async def bare():
    return {{}}

config = uvicorn.Config(app, port=0, log_level="error", access_log=False)
server = uvicorn.Server(config)
began = server.startup

async def startup(sockets=None):
    await began(sockets)
    print(server.servers[0].sockets[0].getsockname()[1], flush=True)

server.startup = startup
server.run()
"""
BODY: dict[str, Any] = {"model": "scripted", "messages": [{"role": "user", "content": "Where is my order?"}]}
ASKED = {
    "bare": ("/bare", {}),
    "chat": ("/v1/chat/completions", BODY),
    "chat, streamed": ("/v1/chat/completions", BODY | {"stream": True}),
    "completion": ("/v1/completions", {"model": "scripted", "prompt": "Where is", "max_tokens": 512}),
}


@contextlib.contextmanager
def server(tokens: int) -> Iterator[tuple[str, psutil.Process]]:
    code = SERVER.format(root=str(Path(__file__).parents[1]), tokens=tokens)
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        port = int(next(line for line in process.stdout if line.strip().isdigit()))  # libraries say things too
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


def measured(url: str, process: psutil.Process, path: str, body: dict[str, Any], count: int) -> dict[str, float]:
    """One request after another."""
    with httpx2.Client() as http:
        for _ in range(50):  # warm
            http.post(url + path, json=body).raise_for_status()
        taken = []
        before = process.cpu_times()
        for _ in range(count):
            began = time.perf_counter()
            http.post(url + path, json=body).raise_for_status()
            taken.append(time.perf_counter() - began)
        after = process.cpu_times()
    spent = after.user + after.system - before.user - before.system
    taken.sort()
    return {
        "median_ms": 1000 * statistics.median(taken),
        "p99_ms": 1000 * taken[int(0.99 * len(taken))],
        "cpu_ms": 1000 * spent / count,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    rows = []
    with server(given.tokens) as (url, process):
        for name, (path, body) in ASKED.items():
            rows.append({"asked": name} | measured(url, process, path, body, given.requests))
            print("  ".join(f"{k}={v:.2f}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()))
    bare = rows[0]["median_ms"]
    for row in rows[1:]:
        print(f"{row['asked']}: the API adds {row['median_ms'] - bare:.2f} ms")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2))
