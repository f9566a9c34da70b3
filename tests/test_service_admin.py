"""Who may do and see what in the service: keys, projects, permissions, models; and where webhooks may lead."""

from __future__ import annotations

import contextlib
import io
import json
import socket
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests import service
from tests.listening import Listening, Quiet
from tests.service import Running, openai, refused

api, client, file = service.api, service.client, service.file


def test_nobody_sees_anothers(api: Running, client: Any) -> None:
    other = api.client(project=api.service.store.keys.create_project("other").id, role="admin")
    file = api.upload()
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file)
    for call in (
        lambda: other.files.retrieve(file),
        lambda: other.files.content(file),
        lambda: other.files.delete(file),
        lambda: other.fine_tuning.jobs.retrieve(job.id),
        lambda: other.fine_tuning.jobs.cancel(job.id),
        lambda: other.fine_tuning.jobs.list_events(job.id),
        lambda: other.fine_tuning.jobs.checkpoints.list(job.id),
    ):
        refused(call, openai.NotFoundError)
    assert refused(lambda: other.fine_tuning.jobs.create(model="tiny", training_file=file))["param"] == "training_file"
    assert list(other.files.list()) == [] and list(other.fine_tuning.jobs.list()) == []


def test_a_key_gives_no_more_than_it_has(api: Running) -> None:
    at = f"/organization/projects/{api.service.store.keys.create_project('held').id}"
    held = api.client(role="admin", scopes=("admin", "files"))
    ask = {"cast_to": object, "body": {"name": "x", "scopes": ["files", "jobs"]}}
    error = refused(lambda: held.post(f"{at}/api_keys", **ask), openai.PermissionDeniedError)
    assert error["param"] == "scopes"
    assert held.post(f"{at}/api_keys", cast_to=object, body={"name": "x"})["scopes"] == ["admin", "files"]
    ask["body"] = {"name": "x", "scopes": ["files"]}
    assert held.post(f"{at}/api_keys", **ask)["scopes"] == ["files"]
    person = api.client(role="admin").post(f"{at}/users", cast_to=object, body={"name": "Bo", "role": "viewer"})
    ask["body"] = {"name": "x", "scopes": ["files"], "user": person["id"]}
    assert "viewer" in refused(lambda: held.post(f"{at}/api_keys", **ask))["message"]
    ask["body"]["role"] = "viewer"
    assert held.post(f"{at}/api_keys", **ask)["role"] == "viewer"


def test_keys_roles_and_scopes(api: Running, file: str) -> None:
    wrong = openai.OpenAI(base_url=f"{api.url}/v1", api_key="sk-wrong", max_retries=0)
    assert refused(lambda: wrong.files.list(), openai.AuthenticationError)["code"] == "invalid_api_key"
    viewer, runner = api.client(role="viewer"), api.client(role="runner")
    assert list(viewer.files.list())
    for call in (
        lambda: viewer.files.create(file=b"x", purpose="batch"),
        lambda: viewer.files.delete(file),
        lambda: viewer.fine_tuning.jobs.create(model="tiny", training_file=file),
        lambda: runner.post("/webhooks", cast_to=object, body={"url": "http://example.com"}),
        lambda: runner.get("/organization/projects", cast_to=object),
        lambda: runner.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body={"priority": 5}),
        lambda: api.client(scopes=("jobs",)).files.list(),
        lambda: api.client(role="runner", scopes=("files",)).fine_tuning.jobs.create(model="tiny", training_file=file),
    ):
        assert refused(call, openai.PermissionDeniedError)["code"] == "insufficient_permissions"
    late = api.client(expires_at=int(time.time()) - 1)
    refused(lambda: late.files.list(), openai.AuthenticationError)


def test_projects_people_and_keys(api: Running, client: Any) -> None:
    def call(method: str, path: str, body: Any = None, by: Any = client) -> Any:
        return getattr(by, method)(path, cast_to=object, **({"body": body} if body is not None else {}))

    project = call("post", "/organization/projects", {"name": "team-x"})
    at = f"/organization/projects/{project['id']}"
    ada = call("post", f"{at}/users", {"name": "Ada", "role": "admin"})
    made = call("post", f"{at}/api_keys", {"name": "hers", "role": "admin", "user": ada["id"], "rpm": 60})
    theirs = openai.OpenAI(base_url=f"{api.url}/v1", api_key=made["value"], max_retries=0)
    assert [p["id"] for p in call("get", "/organization/projects", by=theirs)["data"]] == [project["id"]]
    refused(lambda: call("post", "/organization/projects", {"name": "more"}, theirs), openai.PermissionDeniedError)
    mine = api.service.store.keys.projects()[0].id
    refused(lambda: call("get", f"/organization/projects/{mine}/api_keys", by=theirs), openai.NotFoundError)
    refused(lambda: call("post", f"{at}/api_keys", {"name": "x", "role": "owner"}))
    refused(lambda: call("post", f"{at}/api_keys", {"name": "x", "scopes": ["all"]}))
    listed = call("get", f"{at}/api_keys", by=theirs)["data"]
    assert [k["id"] for k in listed] == [made["id"]] and "value" not in listed[0]
    assert call("delete", f"{at}/users/{ada['id']}")["dependents"] == {"keys": 1}
    refused(lambda: theirs.files.list(), openai.AuthenticationError)
    lines = httpx2.get(f"{api.url}/v1/organization/audit_logs", headers={"Authorization": f"Bearer {api.secret}"}).text
    told = [json.loads(line) for line in lines.splitlines()]
    assert [t["action"] for t in told if t["project"] == project["id"]] == [
        "project.create", "user.create", "key.create", "user.delete",
    ]  # fmt: skip
    assert made["value"] not in lines


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1/x", "http://localhost:8000/", "http://10.0.0.1/", "http://192.168.1.1/", "http://169.254.169.254/latest",
        "http://[::1]/", "http://[::ffff:127.0.0.1]/", "http://0.0.0.0/", "http://2130706433/", "http://0x7f000001/", "http://100.64.0.1/",
        "file:///etc/passwd", "ftp://example.com/", "gopher://x", "http://user:pass@example.com/", "http:///x", "nonsense", "http://x:99999/",
        "http://[::127.0.0.1]/", "http://[fec0::1]/", "http://no-such-host.invalid/",
    ],
)  # fmt: skip
def test_webhooks_never_lead_inside(client: Any, url: str) -> None:
    error = refused(lambda: client.post("/webhooks", cast_to=object, body={"url": url}))
    assert error["param"] == "url" and error["code"] == "invalid_url"


def test_a_webhook_that_turns_inside_later_is_not_called_either() -> None:
    from tunesmith.jobs.webhooks import new_secret, send

    for host in ("127.0.0.1", "[::127.0.0.1]", "[fec0::1]"):
        assert send(f"http://{host}:1/", new_secret(), "evt_1", {}) == "InvalidIPAddress"


def test_a_webhook_is_never_sent_on() -> None:
    """A receiver that answers with an address inside: nobody goes there."""
    from tunesmith.jobs.webhooks import new_secret, send

    asked: list[str] = []

    class Receiver(Quiet):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.read()
            self.send(status=int(self.path[1:]), Location=f"{server.url}/200")

        do_GET = do_POST

    server = Listening(Receiver)
    statuses = (301, 302, 303, 307, 308)
    found = [send(f"{server.url}/{status}", new_secret(), "evt_1", {}, private=True) for status in statuses]
    assert found == [f"answered {status}" for status in statuses]
    assert asked == [f"/{status}" for status in statuses]
    server.close()


def test_a_name_that_changes_its_address_is_called_where_it_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """DNS rebinding: the name leads outside when it is looked at, and inside ever after."""
    from urllib3.util import connection

    from tunesmith.jobs.webhooks import check_url, new_secret, send

    found, called = [], []

    def resolve(host: str, port: Any, *_: Any, **__: Any) -> Any:
        if host != "rebind.example":
            return real(host, port, *_, **__)
        found.append(host)
        address = "93.184.216.34" if len(found) == 1 else "127.0.0.1"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(address: tuple[str, int], *_: Any, **__: Any) -> Any:
        called.append(address)
        raise ConnectionRefusedError

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(connection, "create_connection", connect)
    check_url("http://rebind.example:81/x")
    found.clear()
    assert send("http://rebind.example:81/x", new_secret(), "evt_1", {}) == "ConnectionError"
    assert called == [("93.184.216.34", 81)]
    assert send("http://rebind.example:81/x", new_secret(), "evt_1", {}) == "InvalidIPAddress"
    assert len(called) == 1


def test_a_webhook_that_never_answers_delays_no_other(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from tunesmith import store
    from tunesmith.jobs import webhooks
    from tunesmith.store.tables import Delivery, Webhook

    class Receiver(Quiet):
        def do_POST(self) -> None:
            if "drip" in self.path:  # a byte now and then, for ever
                with contextlib.suppress(OSError):
                    while True:
                        self.wfile.write(b"H")
                        time.sleep(0.1)
            self.send()

    server = Listening(Receiver)
    monkeypatch.setattr(webhooks, "LONGEST", 0.5)
    opened = store.open(database)
    project = opened.keys.create_project("p").id
    with opened.write() as session:
        for name in ("drip", "good"):
            at = f"{server.url}/{name}"
            session.add(
                Webhook(id=name, project=project, url=at, events=[], secret=webhooks.new_secret(), created_at=1)
            )
            session.flush()
            for i in range(30 if name == "drip" else 2):
                id = f"{name}-{i}"
                session.add(Delivery(id=id, webhook=name, type="x", payload={}, created_at=1, next_at=1.0))
                session.flush()
    assert webhooks.deliver(opened, private=True) == 6
    with opened.read() as session:
        rows = {row.id: row for row in session.query(Delivery)}
    assert rows["good-0"].delivered_at and rows["good-1"].delivered_at
    assert rows["drip-0"].last_error and rows["drip-0"].next_at > time.time() and rows["drip-4"].attempts == 0
    server.close()
    opened.close()


def test_checkpoint_permissions(api: Running, client: Any) -> None:
    from tunesmith.store.tables import Model

    keys = api.service.store.keys
    mine, other = keys.caller(api.secret).project, keys.create_project("guest").id  # type: ignore[union-attr]
    name = "ft:tiny:default:a/b:x:ckpt-step-3"
    with api.service.store.write() as session:
        session.add(
            Model(id=name, project=mine, base="tiny", job="ftjob-x", step=3, artifact="models/x/step-3", created_at=1)
        )
    of = client.fine_tuning.checkpoints.permissions
    made = of.create(name, project_ids=[other])
    assert [(p.project_id, p.object) for p in made] == [(other, "checkpoint.permission")]
    assert [p.id for p in of.list(name)] == [p.id for p in made]
    assert refused(lambda: of.create(name, project_ids=["proj_none"]))["param"] == "project_ids"
    refused(lambda: of.create("ft:none", project_ids=[other]), openai.NotFoundError)
    assert of.delete(made.data[0].id, fine_tuned_model_checkpoint=name).deleted
    assert list(of.list(name)) == []


def test_deleting_a_model_deletes_its_weights(api: Running, client: Any) -> None:
    from tunesmith.store.tables import Model

    mine = api.service.store.keys.caller(api.secret).project  # type: ignore[union-attr]
    api.service.artifacts.put("models/gone/adapter.safetensors", io.BytesIO(b"weights"))
    with api.service.store.write() as session:
        session.add(
            Model(
                id="ft:tiny:default::gone",
                project=mine,
                base="tiny",
                job="ftjob-x",
                step=None,
                artifact="models/gone",
                created_at=1,
            )
        )
    runner = api.client(role="runner")
    refused(lambda: runner.models.delete("ft:tiny:default::gone"), openai.PermissionDeniedError)
    gone = client.models.delete("ft:tiny:default::gone")
    assert gone.deleted and not api.service.artifacts.path("models/gone").exists()
    refused(lambda: client.models.delete("ft:tiny:default::gone"), openai.NotFoundError)
    assert not any(b"weights" in p.read_bytes() for p in api.service.settings.folder.rglob("*") if p.is_file())


def test_every_change_is_in_the_audit_log(api: Running) -> None:
    """Who did it, to what; in the order of the changes."""
    import sqlalchemy as sa

    from tunesmith.store.tables import Job, Model

    keys = api.service.store.keys
    project = keys.create_project("audited").id
    made, secret = keys.create("hers", role="admin", project=project)
    client = openai.OpenAI(base_url=f"{api.url}/v1", api_key=secret, max_retries=0)
    file = api.upload(client=client)
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file)
    with api.service.store.write() as session:
        session.execute(sa.update(Job).where(Job.id == job.id).values(status="running"))  # as a worker does
    client.fine_tuning.jobs.pause(job.id)
    client.fine_tuning.jobs.resume(job.id)
    client.fine_tuning.jobs.cancel(job.id)
    upload = client.uploads.create(filename="a.txt", purpose="user_data", mime_type="text/plain", bytes=5)
    client.uploads.cancel(upload.id)
    name, about = "ft:tiny:default::audited", {"base": "tiny", "job": job.id, "step": 3, "artifact": "models/y"}
    with api.service.store.write() as session:
        session.add(Model(id=name, project=project, created_at=1, **about))
    of = client.fine_tuning.checkpoints.permissions
    allowed = of.create(name, project_ids=[project]).data[0].id
    of.delete(allowed, fine_tuned_model_checkpoint=name)
    client.models.delete(name)
    client.files.delete(file)
    hook = client.post("/webhooks", cast_to=object, body={"url": "http://93.184.216.34/x"})["id"]
    client.delete(f"/webhooks/{hook}", cast_to=object)
    theirs = client.post(f"/organization/projects/{project}/api_keys", cast_to=object, body={"name": "x"})["id"]
    client.delete(f"/organization/projects/{project}/api_keys/{theirs}", cast_to=object)
    told = [t for t in api.service.store.audit.export(project) if t["key"] == made.id]
    assert [(t["action"], t["target"]) for t in told] == [
        ("file.create", file), ("job.create", job.id), ("job.pause", job.id), ("job.resume", job.id), ("job.cancel", job.id),
        ("upload.create", upload.id), ("upload.cancel", upload.id), ("permission.create", name), ("permission.delete", name),
        ("model.delete", name), ("file.delete", file), ("webhook.create", hook), ("webhook.delete", hook),
        ("key.create", theirs), ("key.delete", theirs),
    ]  # fmt: skip


def test_keys_and_the_audit_log_from_the_command_line(tunesmith: Any, tmp_path: Path) -> None:
    from tunesmith import store

    at = ("--database", f"sqlite:///{tmp_path}/keys.db")
    words = (
        "keys",
        "create",
        "ci",
        "--role",
        "viewer",
        "--project",
        "new",
        "--scope",
        "files",
        "--days",
        "3",
        "--rpm",
        "9",
    )
    made = tunesmith(*words, *at, "--json").json
    opened = store.open(at[1])
    caller = opened.keys.caller(made["key"])
    assert (caller.key, caller.role, caller.project, caller.rpm) == (made["id"], "viewer", made["project"], 9)
    shown = tunesmith("keys", "create", "mine", *at).out
    assert shown.startswith("sk-") and "shown this once" in shown
    listed = tunesmith("keys", "list", *at, "--json").json
    assert [(k["name"], k["project"], k["role"]) for k in listed] == [
        ("ci", "new", "viewer"),
        ("mine", "default", "runner"),
    ]
    assert abs(listed[0]["expires"] - time.time() - 3 * 86400) < 600 and made["key"] not in json.dumps(listed)
    assert "ci" in tunesmith("keys", "list", *at).out
    assert tunesmith("keys", "revoke", made["id"], *at).out == f"Revoked {made['id']}\n"
    assert opened.keys.caller(made["key"]) is None
    assert tunesmith("keys", "revoke", made["id"], *at).code == 2
    told = [json.loads(line) for line in tunesmith("audit", *at).out.splitlines()]
    assert [(t["action"], t["target"]) for t in told if t["action"].startswith("key")] == [
        ("key.create", made["id"]), ("key.create", listed[1]["id"]), ("key.delete", made["id"]),
    ]  # fmt: skip
    assert made["key"] not in json.dumps(told)
    opened.close()
