"""Which model answers: routes, fallbacks, shadows, promotion, adapters that come and go; through HTTP."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from starlette.testclient import TestClient

from tests.scripted import HI, Scripted, ask, running, said, scripted, state_of
from tunesmith.api.app import build
from tunesmith.errors import RunError
from tunesmith.inference.served import EngineDown, Request
from tunesmith.serve import routes
from tunesmith.serve.models import Served
from tunesmith.serve.section import RouteSection

# Routes


def test_weights_are_kept_and_users_stick() -> None:
    route = RouteSection(versions={"a": 3, "b": 1})
    dice = random.Random(1)
    drawn = Counter(routes.way(route, "r", None, dice).models[0] for _ in range(4000))
    assert 0.72 < drawn["a"] / 4000 < 0.78
    by_user = {u: routes.way(route, "r", f"user-{u}").models[0] for u in range(400)}
    assert by_user == {u: routes.way(route, "r", f"user-{u}").models[0] for u in range(400)}
    assert 0.68 < Counter(by_user.values())["a"] / 400 < 0.82
    assert routes.way(RouteSection(versions={"a": 1, "b": 0}), "r", None).models == ("a",)


def two(**more: Any) -> tuple[Scripted, Scripted]:
    return scripted("From one.", name="one", **more), scripted("From two.", name="two")


def test_a_route_goes_to_its_versions_and_says_which() -> None:
    with TestClient(build(state_of(*two(), routes=None, temperature=0))) as http:
        assert ask(http, model="support").status_code == 404
    section = {"support": {"versions": {"one": 1, "two": 1}}}
    engines = two()
    state = state_of(*engines)
    state.serving.routes = {n: RouteSection(**r) for n, r in section.items()}  # type: ignore[union-attr]
    with TestClient(build(state)) as http:
        found = {u: ask(http, model="support", user=f"u{u}").headers["x-tunesmith-model"] for u in range(30)}
        assert set(found.values()) == {"one", "two"}
        again = {u: ask(http, model="support", user=f"u{u}").headers["x-tunesmith-model"] for u in range(30)}
        assert again == found
        assert ask(http, model="support").json()["model"] == "support"
        assert "support" in [m["id"] for m in http.get("/v1/models").json()["data"]]


def test_a_fallback_answers_when_the_version_fails_and_nothing_was_shown_yet() -> None:
    def fail(request: Request, token: int) -> None:
        raise EngineDown("it died")

    one, other = two(fail=fail)
    with running(state_of(scripted("From far."))) as far:
        state = state_of(one, other)
        assert state.serving is not None
        state.serving.routes = {
            "near": RouteSection(versions={"one": 1}, fallback=("two",)),
            "far": RouteSection(versions={"one": 1}, fallback=(f"{far}/v1#scripted",)),
            "none": RouteSection(versions={"one": 1}),
            "gone": RouteSection(versions={"removed": 1}, fallback=("two",)),
        }
        with TestClient(build(state)) as http:
            assert said(done := ask(http, model="near")) == "From two." and done.headers["x-tunesmith-model"] == "two"
            assert said(done := ask(http, model="far")) == "From far."
            assert done.json()["usage"]["prompt_tokens"] > 0
            assert said(ask(http, model="gone")) == "From two."
            assert ask(http, model="none").status_code == 503
            assert ask(http, model="near", temperature=9).status_code == 400
            assert "tunesmith_fallbacks_total" in http.get("/metrics").text


def test_a_shadow_is_asked_the_same_and_changes_nothing() -> None:
    one, other = two()
    state = state_of(one, other)
    assert state.serving is not None
    state.serving.routes = {"support": RouteSection(versions={"one": 1}, shadow="two")}
    with TestClient(build(state)) as http:
        assert said(ask(http, model="support")) == "From one."
        end = time.monotonic() + 5
        while not other.asked and time.monotonic() < end:
            time.sleep(0.01)
        assert other.asked[0].prompt == one.asked[0].prompt
        other.fail = lambda request, token: (_ for _ in ()).throw(EngineDown("it died"))
        assert said(ask(http, model="support")) == "From one."


def test_promote_and_roll_back_while_serving(tunesmith: Any, tmp_path: Path) -> None:
    file = tmp_path / "routes.yaml"
    assert tunesmith("promote", "support", "one", "--routes", file).code == 0
    with TestClient(build(state_of(*two(), routes=file))) as http:

        def answers(text: str) -> bool:
            end = time.monotonic() + 5
            while time.monotonic() < end:
                if said(ask(http, model="support")) == text:
                    return True
                time.sleep(0.05)
            return False

        assert answers("From one.")
        done = tunesmith("promote", "support", "two", "--routes", file, "--json")
        assert done.json["versions"] == {"two": 1.0} and done.json["before"] == {"one": 1.0}
        assert answers("From two.")
        canary = tunesmith("promote", "support", "one", "--share", "0.25", "--routes", file, "--json").json
        assert canary["versions"] == {"two": 0.75, "one": 0.25}
        assert tunesmith("rollback", "support", "--routes", file).code == 0
        assert tunesmith("rollback", "support", "--routes", file, "--json").json["versions"] == {"one": 1.0}
        assert answers("From one.")
        file.write_text("support: {versions: nonsense}")
        time.sleep(1.1)
        assert said(ask(http, model="support")) == "From one."  # a broken file changes nothing
    refused = tunesmith("rollback", "other", "--routes", tmp_path / "none.yaml")
    assert refused.code == 2 and "no earlier versions" in refused.err


def test_a_version_that_is_not_there_is_opened_before_its_route_moves(tunesmith: Any, tmp_path: Path) -> None:
    one, other = two()
    file = tmp_path / "routes.yaml"
    assert tunesmith("promote", "support", "one", "--routes", file).code == 0
    state = state_of(one, routes=file)
    serving = state.serving
    assert serving is not None
    asked: list[str] = []

    async def fetch(name: str, force: bool) -> None:
        asked.append(name)
        if name != "two":
            raise RunError(f"no run '{name}'")
        serving.models.put(Served("two", other, other.renderer, identity="two"))
        await serving.models.begin()

    serving.fetch = fetch
    with TestClient(build(state)) as http:

        def until(text: str) -> None:
            end = time.monotonic() + 10
            while said(ask(http, model="support")) != text:
                assert time.monotonic() < end
                time.sleep(0.05)

        until("From one.")
        assert tunesmith("promote", "support", "nowhere", "--routes", file).code == 0
        time.sleep(1.2)
        until("From one.")
        assert tunesmith("rollback", "support", "--routes", file).code == 0
        assert tunesmith("promote", "support", "two", "--routes", file).code == 0
        until("From two.")
    assert asked == ["nowhere", "two"] and other.state == "failed"


# Adapters


def test_a_route_to_what_is_gone_names_the_file_and_the_way_back(
    tunesmith: Any, tmp_path: Path, tiny_model: Path
) -> None:
    routes = tmp_path / "runs/routes.yaml"
    tunesmith("promote", "support", "gone", "--routes", routes)
    said = tunesmith("serve", tiny_model, "--port", "0")
    assert said.code == 2 and "'gone'" in said.err and "routes.yaml" in said.err and "rollback" in said.err


def test_adapters_come_and_go_while_others_answer(tmp_path: Path) -> None:
    engine = scripted(lambda r: f"I am {r.adapter}.")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "lora").mkdir(exist_ok=True)
        (tmp_path / "lora" / name).write_text("{}")
    with running(state_of(engine)) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0) as client:
        load = {"lora_name": "mine", "lora_path": str(tmp_path / "lora")}
        loaded = httpx2.post(f"{url}/v1/load_lora_adapter", json=load)
        assert loaded.status_code == 200 and "added successfully" in loaded.text
        assert [(m.id, m.to_dict()["parent"]) for m in client.models.list()] == [
            ("scripted", None),
            ("mine", "scripted"),
        ]
        done = client.chat.completions.create(model="mine", messages=HI)  # type: ignore[arg-type]
        assert done.choices[0].message.content == "I am mine."
        again = httpx2.post(f"{url}/v1/load_lora_adapter", json=load)
        assert again.status_code == 400 and again.json()["error"]["code"] == "model_exists"
        assert httpx2.post(f"{url}/v1/load_lora_adapter", json=load | {"load_inplace": True}).status_code == 200
        bad = httpx2.post(f"{url}/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/etc/../etc"})
        assert bad.status_code == 400 and bad.json()["error"]["param"] == "lora_path"
        assert httpx2.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "scripted"}).status_code == 404
        assert httpx2.post(f"{url}/v1/unload_lora_adapter", json={"lora_name": "mine"}).status_code == 200
        with pytest.raises(openai.NotFoundError):
            client.chat.completions.create(model="mine", messages=HI)  # type: ignore[arg-type]
        assert engine.loaded == {}


def test_many_promote_at_once_and_nobody_sees_half_of_it(tmp_path: Path) -> None:
    file, stop, seen = tmp_path / "routes.yaml", threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            seen.append(len(routes.read(file)))  # raises where it is no whole file

    def promote(number: int) -> None:
        for step in range(4):
            routes.promote(file, f"route{number}", f"v{step}")

    with ThreadPoolExecutor(9) as pool:
        looking = pool.submit(look)
        for done in [pool.submit(promote, number) for number in range(8)]:
            done.result()
        stop.set()
        looking.result()
    assert {name: list(r.versions) for name, r in routes.read(file).items()} == {f"route{i}": ["v3"] for i in range(8)}
    assert seen == sorted(seen) and seen[-1] == 8
    for _ in range(3):
        routes.rollback(file, "route3")
    assert list(routes.read(file)["route3"].versions) == ["v0"]


def test_a_promotion_that_is_killed_while_it_writes_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "routes.yaml"
    routes.promote(file, "support", "one")
    before = file.read_bytes()
    code = f"""
import pathlib, time
from tunesmith.serve import routes
def wait(self, target):
    print(self.stat().st_size, flush=True)
    time.sleep(600)
pathlib.Path.replace = wait
routes.promote(pathlib.Path({str(file)!r}), "support", "two")
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout and int(process.stdout.readline()) > len(before)  # it has written, and not renamed
    process.kill()
    process.wait()
    assert file.read_bytes() == before and list(routes.read(file)["support"].versions) == ["one"]
    routes.promote(file, "support", "three")  # its lock went with it
    assert list(routes.read(file)["support"].versions) == ["three"]
