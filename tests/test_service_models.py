"""The service's models: what answers follows the database, and nobody loads one by hand."""

from __future__ import annotations

import asyncio
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from fastapi.testclient import TestClient

from tests.scripted import scripted, state_of
from tests.service import settings, wait
from tunesmith.api import tuned
from tunesmith.api.app import SERVING, State, build
from tunesmith.api.tuned import Registry
from tunesmith.api.up import MANAGING
from tunesmith.errors import RunError
from tunesmith.inference.engines import Auto
from tunesmith.jobs import sweep
from tunesmith.jobs.chores import Chores
from tunesmith.jobs.service import Service, open_service
from tunesmith.serve.models import Models
from tunesmith.serve.section import ServeSection
from tunesmith.store import tables as t

TINY = "ft:tiny:default::"


@pytest.fixture
def service(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "converted"))
    opened = open_service(settings(tmp_path, tiny_model))
    yield opened
    opened.store.close()


@pytest.fixture
def state(service: Service) -> State:
    made = state_of(scripted(name="tiny"), store=service.store)
    made.service, made.local = service, False
    assert made.serving is not None
    made.registry = Registry(service, made.serving.models)
    made.parts.append(Chores(service))
    return made


@pytest.fixture
def http(state: State) -> Iterator[TestClient]:
    with TestClient(build(state, (*MANAGING, *SERVING))) as client:
        yield client


def add(service: Service, project: str, name: str, weights: bytes | None = b"weights") -> str:
    """A tuned model; without weights, one that can't be loaded."""
    id, artifact = TINY + name, f"models/ftjob-{name}/final"
    folder = Path(service.artifacts._at(artifact))
    if weights is not None:
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").write_bytes(weights)
        (folder / "adapter_config.json").write_text("{}")
    with service.store.write() as session:
        session.add(
            t.Model(
                id=id, project=project, base="tiny", job=f"ftjob-{name}", step=None, artifact=artifact, created_at=1
            )
        )
    return id


def job(service: Service, project: str, model: str) -> str:
    """A finished job that made it."""
    id = f"ftjob-{model.rpartition(':')[2]}"
    made: dict[str, Any] = {name: {} for name in ("method", "hyperparameters", "settings", "info", "needs")}
    made |= {"result_files": [], "integrations": [], "seed": 1, "training_file": "file-x", "created_at": 1}
    with service.store.write() as session:
        session.add(t.Job(id=id, project=project, status="succeeded", model="tiny", fine_tuned_model=model, **made))
    return id


def key(service: Service, **more: Any) -> tuple[str, dict[str, str]]:
    made, secret = service.store.keys.create("test", **more)
    return made.project, {"Authorization": f"Bearer {secret}"}


def test_nobody_loads_or_unloads_by_hand(service: Service, http: TestClient, tmp_path: Path) -> None:
    service.store.keys.create_project("other")
    _, other = key(service, project="other", role="admin")
    mine, own = key(service, role="admin")
    name = add(service, mine, "a")
    wait(lambda: name in [m["id"] for m in http.get("/v1/models", headers=own).json()["data"]], "the model")
    for headers in (other, own):
        for verb, body in (
            ("load", {"lora_name": name, "lora_path": "/etc", "load_inplace": True}),
            ("load", {"lora_name": "x", "lora_path": service.artifacts._at("models/ftjob-a/final")}),
            ("unload", {"lora_name": name}),
            ("unload", {"lora_name": TINY + "b"}),
        ):
            answer = http.post(f"/v1/{verb}_lora_adapter", json=body, headers=headers)
            assert answer.status_code == 403 and answer.json()["error"]["code"] == "unsupported"
            assert name not in answer.text
    assert name in [m["id"] for m in http.get("/v1/models", headers=own).json()["data"]]


def test_figures_and_paths_are_the_servers(service: Service, http: TestClient) -> None:
    other = service.store.keys.create_project("other").id
    for more, status in (
        ({"project": other, "role": "admin"}, 403),
        ({"role": "runner"}, 403),
        ({"role": "admin", "scopes": ("feedback",)}, 200),
    ):
        assert http.get("/metrics", headers=key(service, **more)[1]).status_code == status, more
    for scope, status in (("files", 403), ("models", 200), ("chat", 200)):
        headers = key(service, scopes=(scope,))[1]
        assert http.get("/v1/models", headers=headers).status_code == status
        assert http.get("/v1/models/tiny", headers=headers).status_code == status
    project, mine = key(service)
    name = add(service, project, "mine")
    id = job(service, project, name)
    http.get(f"/v1/fine_tuning/jobs/{id}", headers=mine)
    shown = http.get(f"/v1/models/{name}", headers=mine)
    assert shown.json()["root"] == name and str(service.settings.folder) not in shown.text


def test_a_cache_keeps_nothing_that_was_deleted_elsewhere(service: Service) -> None:
    project = key(service)[0]
    name = add(service, project, "kept")
    cache = service.artifacts.cache
    for artifact in ("models/ftjob-kept/final", "models/ftjob-gone/step-3"):
        (cache / artifact).mkdir(parents=True)
        (cache / artifact / "adapter_model.safetensors").write_bytes(b"weights")
    (cache / "files").mkdir()
    (cache / "files/file-gone").write_bytes(b"rows")
    sweep.sweep(service)
    assert service.model(name) is not None
    assert [p.parent.parent.name for p in cache.rglob("*") if p.is_file()] == ["ftjob-kept"]


def test_the_first_key_is_made_when_it_can_be_told(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.api import up

    monkeypatch.setattr(up, "opened", lambda *_: Models())
    monkeypatch.setattr(up.signal, "signal", lambda *_: None)
    wanted = up.Settings(service=settings(tmp_path, tiny_model), serve=ServeSection())
    said: list[dict[str, Any]] = []
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises((RunError, SystemExit)):
            up.up(wanted, up.Place(port=taken.getsockname()[1]), "api", said.append)
    assert not said
    service = open_service(wanted.service)
    assert not service.store.keys.any()
    service.store.close()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("service: {homes: x}", "service.homes: unknown key; did you mean 'home'?"),
        ("service: [1]", "service: expected a mapping of keys"),
        ("serve: {engine: nope}", "serve.engine: no serving is called 'nope'"),
        ("serve: {dedline: 3}", "serve.dedline: unknown key; did you mean 'deadline'?"),
        ("server: {}", "server: unknown key; did you mean 'serve'?"),
        ("service: {models: {'a:b': x}}", "colons divide"),
        ("[1]", "holds no settings"),
        ("service: {", "is not YAML"),
        (None, "can't be read"),
    ],
)
def test_settings_that_can_not_be_meant_name_the_key(text: str | None, told: str, tmp_path: Path) -> None:
    from tunesmith.api import up
    from tunesmith.errors import RecipeError

    file = tmp_path / "settings.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(RecipeError) as error:
        up.read_settings(file, {"workers": 2})
    assert told in error.value.what and error.value.where.startswith(str(file)) and error.value.fix
    for good in ("", "service:", "serve: {deadline: 9}"):
        file.write_text(good)
        assert up.read_settings(file, {"workers": 2}).service.workers == 2


def test_a_model_that_hangs_or_fails_holds_up_no_other(
    service: Service, state: State, http: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuned, "PATIENCE", 0.3)
    engine = state.serving.models.engines[0]  # type: ignore[union-attr]
    load = engine.load_adapter

    async def slow(name: str, path: Path) -> None:
        if name.endswith("slow"):
            await asyncio.sleep(3600)
        if name.endswith("odd"):
            raise KeyError("what no engine should raise")
        await load(name, path)

    monkeypatch.setattr(engine, "load_adapter", slow)
    project, mine = key(service, role="admin")
    odd, good = add(service, project, "odd"), add(service, project, "good")
    jobs = [job(service, project, name) for name in (odd, good)]
    for id in jobs:
        assert http.get(f"/v1/fine_tuning/jobs/{id}", headers=mine).status_code == 200
    answers = [m["id"] for m in http.get("/v1/models", headers=mine).json()["data"]]
    assert good in answers and odd not in answers
    late = job(service, project, add(service, project, "slow"))
    for id in (late, *jobs):
        began = time.monotonic()
        assert http.get(f"/v1/fine_tuning/jobs/{id}", headers=mine).status_code == 200
        assert time.monotonic() - began < 30
    state.serving.models._served.pop(good)  # type: ignore[union-attr]  # as where an engine has lost it
    assert http.get("/v1/fine_tuning/jobs", headers=mine).status_code == 200


def test_a_model_that_failed_is_tried_again_later_and_later(
    service: Service, http: TestClient, monkeypatch: pytest.MonkeyPatch, state: State
) -> None:
    monkeypatch.setattr(tuned, "AGAIN", 0.2)
    project, mine = key(service, role="admin")
    name = add(service, project, "late", weights=None)
    wait(lambda: state.registry._failed.get(name, (0, 0))[1] >= 0.4, "the second try")
    folder = Path(service.artifacts._at("models/ftjob-late/final"))
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    wait(lambda: name in [m["id"] for m in http.get("/v1/models", headers=mine).json()["data"]], "the model")
    assert name not in state.registry._failed


def test_a_model_of_its_own_answers_on_an_engine_of_its_own_until_it_is_deleted(
    service: Service, state: State, http: TestClient, tiny_model: Path
) -> None:
    assert state.serving is not None and state.registry is not None
    made: list[Any] = []

    class Own(Auto):
        def build(self, name: str, model: Any) -> Any:
            made.append(scripted("By myself.", name=name, precision="q8_0"))
            return made[-1]

    state.registry.engine = Own()
    project, mine = key(service, role="admin")
    _, other = key(service, project=service.store.keys.create_project("other").id)
    name = add(service, project, "alone", weights=None)
    shutil.copytree(tiny_model, service.artifacts._at("models/ftjob-alone/final"))
    with service.store.write() as session:
        session.execute(sa.update(t.Model).values(whole=True))
    job(service, project, name)
    assert http.get("/v1/fine_tuning/jobs/ftjob-alone", headers=mine).status_code == 200
    body = {"model": name, "messages": [{"role": "user", "content": "Hi"}]}
    said = http.post("/v1/chat/completions", json=body, headers=mine)
    assert said.json()["choices"][0]["message"]["content"] == "By myself.", said.text
    assert http.post("/v1/chat/completions", json=body, headers=other).status_code == 404
    assert len(state.serving.models.engines) == 2 and made[0].state == "ready"
    kept = next(iter(state.registry.converted.names.values()))
    assert kept.endswith("-q8_0.gguf")
    Path(kept).parent.mkdir(parents=True, exist_ok=True)
    Path(kept).write_bytes(b"weights")  # as llama.cpp's engine would have it
    assert http.delete(f"/v1/models/{name}", headers=mine).status_code == 200
    wait(lambda: made[0].state == "failed" and not Path(kept).exists(), "the engine's end")
    assert http.post("/v1/chat/completions", json=body, headers=mine).status_code == 404


def test_what_an_engine_made_of_a_model_goes_with_it(service: Service, state: State, http: TestClient) -> None:
    from tunesmith.models.gguf_file import adapter_place

    project, mine = key(service, role="admin")
    names = [add(service, project, name, name.encode()) for name in ("one", "two")]
    for id in [job(service, project, name) for name in names]:
        http.get(f"/v1/fine_tuning/jobs/{id}", headers=mine)
    places = [adapter_place(service.artifacts.path(f"models/ftjob-{name}/final")) for name in ("one", "two")]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(b"weights")
    assert http.delete(f"/v1/models/{names[0]}", headers=mine).json()["deleted"]
    assert [place.exists() for place in places] == [False, True]
    with service.store.write() as session:  # on another machine, while this one did not run
        session.query(t.Model).filter_by(id=names[1]).delete()
    assert Registry(service, state.serving.models).converted.names.keys() == {names[1]}  # type: ignore[union-attr]
    wait(lambda: not places[1].exists(), "its end")
