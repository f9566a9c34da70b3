"""What the scripts of our pages do, in a real browser: the report's search, the chat page's talk, the API's page."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.browser import driven
from tests.conftest import colour_rows, write_jsonl
from tests.fake_endpoint import FakeEndpoint
from tests.listening import Quiet
from tunesmith.api import pages
from tunesmith.api.app import SERVING, State, build
from tunesmith.api.up import MANAGING
from tunesmith.jobs.section import ServiceSection

ASSETS = Path(pages.__file__).parent / "assets"

SEARCH = """
const find = document.getElementById("find");
const looked = (text) => {
  find.value = text;
  find.dispatchEvent(new Event("input", { bubbles: true }));
  const rows = [...document.querySelectorAll("#every tbody tr")];
  const shown = rows.filter((row) => getComputedStyle(row).display !== "none");
  return [shown.map((row) => row.textContent), document.getElementById("found").textContent];
};
return { few: looked("ITEM 3 "), answer: looked("mauve"), none: looked("no such words"), all: looked("") };
"""

TALK = """
const said = () => [...document.querySelectorAll(".turn.assistant > div:first-child")].map((box) => box.textContent);
const idle = () => at("send").textContent === "Send";
const say = (text) => { at("text").value = text; at("ask").requestSubmit(); };
await until(() => at("model").value === "first");
at("key").value = " secret "; at("key").onchange();
say("hello"); await until(() => idle() && document.querySelector(".about"));
const cited = document.querySelector("details").textContent;
document.querySelector(".about button").click();
await until(() => document.querySelector(".about").textContent === "Thank you.");
say("wait"); await until(() => said()[1] === "begun");
const button = at("send").textContent;
at("ask").requestSubmit(); await until(idle);
say("refuse"); await until(() => idle() && said().length === 3);
say("break"); await until(() => idle() && said().length === 4);
const wrong = [...document.querySelectorAll(".turn.assistant")].map((box) => box.classList.contains("error"));
const told = { said: said(), wrong, cited, button, rated: document.querySelectorAll(".about").length };
at("new").onclick();
told.left = document.querySelectorAll(".turn").length;
say("hello"); await until(() => idle() && document.querySelector(".about"));
return told;
"""

READ = """
await until(() => document.querySelectorAll("#shapes details").length || at("routes").textContent);
const name = (box) => box.querySelector("summary").textContent;
const rows = (box) => [...box.querySelectorAll("tr")].map((row) => [...row.children].map((cell) => cell.textContent));
const routes = [...document.querySelectorAll("#routes details")];
const shapes = [...document.querySelectorAll("#shapes details")];
const links = [...document.querySelectorAll("details a")];
const told = { routes: routes.map(name), shapes: shapes.map(name), text: document.body.textContent };
told.lost = links.filter((a) => !shapes.includes(at(a.textContent))).map((a) => a.textContent);
told.tables = Object.fromEntries([...routes, ...shapes].map((box) => [name(box), rows(box)]));
told.example = [at("example").textContent, location.origin];
if (links.length) {
  links[0].click();
  told.opened = [links[0].textContent, location.hash.slice(1), name(document.querySelector("[open]"))];
}
return told;
"""


def test_the_report_finds_answers(tunesmith: Any, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "test.jsonl", colour_rows(12))
    mauve = lambda messages: "mauve" if "Item 7 " in messages[-1]["content"] else "red"  # noqa: E731
    with FakeEndpoint(mauve) as one, FakeEndpoint(lambda messages: "red") as other:
        call = ["--model", f"{one.url}#one", "--against", f"{other.url}#other", "--data", data]
        assert tunesmith("evaluate", *call).code in (0, 3, 4)
    found = driven(tmp_path, (tmp_path / "evaluation/report.html").read_text(), SEARCH)
    (row,), told = found["few"]
    assert "Item 3 " in row and told == "1 rows"
    (row,), _ = found["answer"]
    assert "Item 7 " in row  # answers are searched as questions are
    assert found["none"] == [[], "0 rows"]
    assert len(found["all"][0]) == 12 and found["all"][1] == "12 rows"


def test_the_chat_page_talks(tmp_path: Path) -> None:
    """Pieces of a stream that end anywhere, a stop, a refusal, an error in the midst, ratings, and what is sent."""
    asked: list[Any] = []
    keys: list[str | None] = []
    gone = threading.Event()

    def event(**told: Any) -> bytes:
        return b"data: " + json.dumps(told, ensure_ascii=False).encode() + b"\n\n"

    def delta(text: str, **more: Any) -> bytes:
        return event(id="c1", choices=[{"delta": {"content": text}}], **more)

    def answer(request: Quiet, path: str) -> None:
        if path == "/v1/models":
            keys.append(request.headers.get("Authorization"))
            return request.send(json.dumps({"data": [{"id": "first"}, {"id": "second"}]}).encode())
        if path == "/v1/feedback":
            asked.append(json.loads(request.read()))
            return request.send(b"{}")
        if path != "/v1/chat/completions":
            file = ASSETS / Path(path).name
            kind = "text/javascript" if path.endswith(".js") else "text/css"
            return request.send(file.read_bytes() if file.is_file() else b"", **{"Content-Type": kind})
        asked.append(json.loads(request.read()))
        text = asked[-1]["messages"][-1]["content"]
        if text == "refuse":
            return request.send(b'{"error": {"message": "too many"}}', status=429)
        request.send_response(200)
        request.send_header("Content-Type", "text/event-stream")
        request.end_headers()
        source = {"index": 1, "title": "Rules", "text": "All is <b>well</b>."}
        if text == "hello":
            whole = delta("", sources=[source]) + delta("Héllo ") + delta("<i>you</i>") + b"data: [DONE]\n\n"
            for at in range(0, len(whole), 7):  # in the midst of lines and of letters
                request.wfile.write(whole[at : at + 7])
                request.wfile.flush()
        elif text == "wait":
            try:
                while not gone.wait(0.05):
                    request.wfile.write(delta("begun") if not gone.is_set() and not waited else b": still here\n\n")
                    request.wfile.flush()
                    waited.append(1)
            except OSError:
                gone.set()  # whoever asked has hung up
        else:
            request.wfile.write(delta("half ") + event(error={"message": "engine died"}))
        return None

    waited: list[int] = []
    page = (ASSETS / "chat.html").read_text()
    found = driven(tmp_path, page, TALK, answer, pages.HEADERS["content-security-policy"])
    assert found["said"] == ["Héllo <i>you</i>", "begun", "too many", "half engine died"]
    assert found["wrong"] == [False, False, True, True] and found["button"] == "Stop"
    assert found["cited"] == "1 passages[1] Rules: All is <b>well</b>." and found["rated"] == 1 and found["left"] == 0
    assert gone.wait(10)  # a stop reaches the server
    assert keys[0] is None and keys[-1] == "Bearer secret"
    first, rating, *_, last = asked
    assert rating == {"id": "c1", "rating": 1}
    assert first == {
        "model": "first", "messages": [{"role": "user", "content": "hello"}], "temperature": 0, "stream": True,
    }  # fmt: skip
    assert last["messages"] == [{"role": "user", "content": "hello"}]  # a new talk begins empty
    fourth = asked[-2]["messages"]
    assert [turn["role"] for turn in fourth] == ["user", "assistant"] * 3 + ["user"]
    assert [turn["content"] for turn in fourth[1::2]] == ["Héllo <i>you</i>", "begun", "too many"]


@pytest.mark.parametrize("away", [False, True])
def test_the_page_of_the_api_tells_all_of_it(away: bool, tmp_path: Path) -> None:
    """Every route of the service with what it asks and answers, every shape, and links between them that lead there."""
    service = SimpleNamespace(settings=ServiceSection())
    api = build(State(service=service, local=False), (*MANAGING, *SERVING)).openapi()

    def answer(request: Quiet, path: str) -> None:
        if path == "/openapi.json":
            return request.send(b"", 503) if away else request.send(json.dumps(api).encode())
        file = ASSETS / Path(path).name
        kind = "text/javascript" if path.endswith(".js") else "text/css"
        return request.send(file.read_bytes() if file.is_file() else b"", **{"Content-Type": kind})

    page = (ASSETS / "docs.html").read_text()
    found = driven(tmp_path, page, READ, answer, pages.HEADERS["content-security-policy"])
    assert f'base_url="{found["example"][1]}/v1"' in found["example"][0]
    if away:
        assert "can't be read" in found["text"] and found["routes"] == []
        return
    assert found["routes"] == [verb.upper() + path for path, verbs in api["paths"].items() for verb in verbs]
    shapes = api["components"]["schemas"]
    assert found["shapes"] == list(shapes) and found["lost"] == []
    assert "undefined" not in found["text"] and "[object" not in found["text"]
    clicked, address, opened = found["opened"]
    assert clicked == address == opened
    for name, shape in shapes.items():
        names = [(row[0], row[2] == "required") for row in found["tables"][name]]
        assert names == [(field, field in shape.get("required", ())) for field in shape.get("properties", {})], name
    rows = {row[0]: row[1:] for row in found["tables"]["POST/v1/chat/completions"]}
    assert rows["model"][:2] == ["string", "required"] and rows["messages"][0].startswith("list of ")
    assert {row[0] for row in found["tables"]["GET/v1/fine_tuning/jobs/{id}/events"]} >= {"id", "after", "limit"}
