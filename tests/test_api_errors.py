"""What bad requests get: the contract's error shape, a request id, never a trace."""

from __future__ import annotations

import json
import logging
from typing import Annotated, Any

import pytest
from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.testclient import TestClient

from tunesmith.api.app import State, build
from tunesmith.api.auth import Called, needs
from tunesmith.serve.section import ServeSection


class Part(BaseModel):
    content: str | list[str]
    role: str


class Body(BaseModel):
    messages: list[Part]
    n: Annotated[int, Field(ge=1)] = 1


def client(keys: tuple[str, ...] = (), local: bool = True, **settings: Any) -> TestClient:
    app = build(State(ServeSection(**settings), keys=keys, local=local))
    routes = APIRouter()

    @routes.post("/v1/things")
    async def things(body: Body, who: Called) -> dict[str, Any]:
        if body.n == 7:
            raise RuntimeError("secret inside")
        return {"key": who.key}

    @routes.delete("/v1/things", dependencies=[needs("admin")])
    async def gone() -> None:
        return None

    app.router.include_router(routes, max_body_size=app.state.tunesmith.settings.max_body)
    return TestClient(app)


def told(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["x-request-id"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


GOOD = {"messages": [{"role": "user", "content": "Hi"}]}


def test_every_error_has_the_one_shape() -> None:
    with client(max_body=2000) as http:
        assert told(http.get("/nowhere"), 404)["code"] == "unknown_url"
        assert told(http.get("/v1/things"), 405)["type"] == "invalid_request_error"
        assert "JSON" in told(http.post("/v1/things", content="{'no"), 400)["message"]
        typed = {"content-type": "application/json"}
        for wrong, why in ((b'{"n": "\xff"}', "not UTF-8"), (b"[" * 1500, "nested too deep"), (b"{'no", "enclosed")):
            error = told(http.post("/v1/things", content=wrong, headers=typed), 400)
            assert error["code"] == "invalid_json" and why in error["message"], error
        packed = typed | {"content-encoding": "gzip"}
        assert "Content-Encoding" in told(http.post("/v1/things", content=b"x", headers=packed), 415)["message"]
        assert told(http.post("/v1/things", content="\xff\xfe".encode("latin-1")), 400)
        assert told(http.post("/v1/things", json=[1]), 400)
        wrong = {"messages": [GOOD["messages"][0], {"role": "user", "content": 5}]}
        error = told(http.post("/v1/things", json=wrong), 400)
        assert error["param"] == "messages.1.content" and "messages.1.content" in error["message"]
        assert told(http.post("/v1/things", json=GOOD | {"n": 0}), 400)["param"] == "n"
        assert told(http.post("/v1/things", json=GOOD | {"x": "y" * 3000}), 413)["code"] == "request_too_large"
        assert http.post("/v1/things", json=GOOD).json() == {"key": "local"}


def test_a_crash_tells_nothing_of_the_inside(caplog: pytest.LogCaptureFixture) -> None:
    with client() as http, caplog.at_level(logging.ERROR, "tunesmith.api"):
        response = http.post("/v1/things", json=GOOD | {"n": 7}, headers={"x-request-id": "mine-1"})
    error = told(response, 500)
    assert error["type"] == "server_error" and "secret" not in response.text and "Traceback" not in response.text
    assert response.headers["x-request-id"] == "mine-1"
    assert "secret inside" in caplog.text


def test_keys() -> None:
    with client(keys=("sk-one-abcdefghijkl",)) as http:
        assert told(http.post("/v1/things", json=GOOD), 401)["code"] == "invalid_api_key"
        wrong = told(http.post("/v1/things", json=GOOD, headers={"authorization": "Bearer sk-two-abcdefghijkl"}), 401)
        assert wrong["code"] == "invalid_api_key" and "sk-two-abcdefghijkl" not in wrong["message"]
        right = {"authorization": "Bearer sk-one-abcdefghijkl"}
        assert http.post("/v1/things", json=GOOD, headers=right).status_code == 200
        assert http.delete("/v1/things", headers=right).status_code == 200
    with client(local=False) as http:
        assert told(http.post("/v1/things", json=GOOD), 401)["code"] == "no_keys"


def test_the_log_has_a_line_a_request_and_no_text(caplog: pytest.LogCaptureFixture) -> None:
    with client() as http, caplog.at_level(logging.INFO, "tunesmith.access"):
        http.post("/v1/things", json={"messages": [{"role": "user", "content": "my own words"}]})
    line = json.loads(caplog.records[-1].getMessage())
    assert line["path"] == "/v1/things" and line["status"] == 200 and line["ms"] > 0
    assert "my own words" not in caplog.text


def test_other_origins_are_let_in_only_where_said() -> None:
    asks = {"origin": "https://app.example", "access-control-request-method": "POST"}
    with client() as http:
        assert "access-control-allow-origin" not in http.options("/v1/things", headers=asks).headers
    with client(cors=("https://app.example",)) as http:
        assert http.options("/v1/things", headers=asks).headers["access-control-allow-origin"] == "https://app.example"
