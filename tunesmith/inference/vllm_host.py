"""The process beside a vLLM server: it starts it, says when it answers, and ends it with its parent."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from tunesmith.errors import MachineError, ModelError
from tunesmith.inference.host import Wire


def main() -> None:
    wire = Wire()
    messages = wire.told()
    server: subprocess.Popen[bytes] | None = None
    try:
        told = next(messages)
        address = told["url"] or f"http://127.0.0.1:{_free_port()}"
        server = None if told["url"] else _started(told, address)
        threading.Thread(target=_until_parent_ends, args=(messages, server), daemon=True).start()
        _wait(server, address, told["patience"])
    except Exception as error:
        wire.refuse(error)
        _end(server, 1)
    wire.tell(ready={"url": address})
    while server is None:
        signal.pause()
    _end(server, server.wait())


def _started(told: dict[str, Any], address: str) -> subprocess.Popen[bytes]:
    program = shutil.which(told["command"][0])
    if program is None:
        raise MachineError(
            f"there is no program '{told['command'][0]}'",
            where="engine: vllm",
            fix="Install vLLM (docs.vllm.ai), or take engine: auto.",
        )
    port = address.rpartition(":")[2]
    command = [program, *told["command"][1:], *told["arguments"], "--host", "127.0.0.1", "--port", port]
    environment = {**os.environ, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, process_group=0)


def _wait(server: subprocess.Popen[bytes] | None, address: str, patience: float) -> None:
    """Until the server answers."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if server is not None and server.poll() is not None:
            raise ModelError(f"vLLM ended while it loaded the model (code {server.returncode})", fix="See its output.")
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.2)
    raise ModelError(f"no answer from {address}/health in {patience:.0f} s", fix="See its output.")


def _until_parent_ends(messages: Iterator[Any], server: subprocess.Popen[bytes] | None) -> None:
    for _ in messages:
        pass
    _end(server, 0)


def _end(server: subprocess.Popen[bytes] | None, code: int) -> None:
    if server is not None and server.poll() is None:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    main()
