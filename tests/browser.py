"""Pages as a browser shows them: Chromium loads one, a script uses it as a person would, and says what it saw."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.listening import Listening, Quiet

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = """
const until = async (seen) => {
  for (let i = 0; i < 1200; i++) { if (seen()) return; await new Promise((go) => setTimeout(go, 25)); }
  throw new Error("waited for " + seen);
};
const tell = (told) => fetch("/told", { method: "POST", body: JSON.stringify(told) });
(async () => { %s })().then((told) => tell({ told }), (error) => tell({ error: String(error.stack) }));
"""


def driven(
    folder: Path, page: str, script: str, answer: Callable[[Quiet, str], None] | None = None, policy: str = ""
) -> Any:
    """What `script`, the body of an async function, returns of a page; skips where there is no Chromium.

    Args:
        answer: handles the page's other requests, told the path.
        policy: the content security policy that the page comes with.
    """
    if CHROMIUM is None:
        pytest.skip("no Chromium that could show the page")
    outcome: queue.Queue[Any] = queue.Queue()
    headers = {"Content-Security-Policy": policy} if policy else {}

    class Handler(Quiet):
        def do_GET(self) -> None:
            if self.path == "/":
                whole = page.replace("</body>", '<script src="/drive.js"></script></body>')
                self.send(whole.encode(), **{"Content-Type": "text/html; charset=utf-8"}, **headers)
            elif self.path == "/drive.js":
                self.send((DRIVER % script).encode(), **{"Content-Type": "text/javascript; charset=utf-8"})
            elif answer:
                answer(self, self.path)
            else:
                self.send(status=404)

        def do_POST(self) -> None:
            if self.path == "/told":
                outcome.put(json.loads(self.read()))
                self.send()
            elif answer:
                answer(self, self.path)

    server = Listening(Handler)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={folder / 'browser'}"]
    browser = subprocess.Popen([CHROMIUM, *flags, server.url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        found = outcome.get(timeout=120)
    finally:
        browser.terminate()
        browser.wait(30)
        server.close()
    assert "error" not in found, found["error"]
    return found["told"]
