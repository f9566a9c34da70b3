"""Clients that others wrote, as they are: litellm, LangChain and a late 2.x of openai, in an environment of their own;
promptfoo; and schemathesis, which asks what no client would."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import service
from tests.anything import ask_anything, operations
from tests.scripted import HERMES, running, scripted, state_of
from tunesmith.inference.served import Request

CLIENTS = os.environ.get("TUNESMITH_CLIENTS")  # a Python that has openai 2.x, litellm and langchain-openai
PROMPTFOO = os.environ.get("TUNESMITH_PROMPTFOO", "")  # its command
TUNED = "ft:tiny:default:colours:abc12345"
OTHERS = """
import json, os, sys
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm, openai
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

url = sys.argv[1]
assert openai.__version__.startswith("2."), openai.__version__
hi = [{"role": "user", "content": "What colour is it?"}]
tool = {"type": "function", "function": {"name": "weather", "description": "-", "parameters": {
    "type": "object", "properties": {"place": {"type": "string"}}, "required": ["place"]}}}

service = openai.OpenAI(base_url=sys.argv[2], api_key=sys.argv[3], max_retries=0)
rows = "".join(json.dumps({"messages": [*hi, {"role": "assistant", "content": "Blue."}]}) + "\\n" for _ in range(12))
file = service.files.create(file=("rows.jsonl", rows.encode()), purpose="fine-tune")
job = service.fine_tuning.jobs.create(model="tiny", training_file=file.id, hyperparameters={"n_epochs": 2})
assert service.fine_tuning.jobs.retrieve(job.id).status == "validating_files"
assert [j.id for j in service.fine_tuning.jobs.list()] == [job.id]
assert service.fine_tuning.jobs.list_events(job.id).data[-1].message.startswith("Created")
assert service.fine_tuning.jobs.cancel(job.id).status == "cancelled"
assert service.files.delete(file.id).deleted

client = openai.OpenAI(base_url=url, api_key="sk-a")
assert client.chat.completions.create(model="scripted", messages=hi).choices[0].message.content == "Blue it is."
with client.chat.completions.stream(model="scripted", messages=hi) as events:
    assert events.get_final_completion().choices[0].message.content == "Blue it is."
assert len(client.embeddings.create(model="scripted", input="a").data[0].embedding) == 4

named = {"model": "openai/scripted", "api_base": url, "api_key": "sk-a"}
assert litellm.completion(messages=hi, **named).choices[0].message.content == "Blue it is."
parts = litellm.completion(messages=hi, stream=True, **named)
assert "".join(p.choices[0].delta.content or "" for p in parts) == "Blue it is."
called = litellm.completion(messages=hi, tools=[tool], tool_choice="required", **named)
assert json.loads(called.choices[0].message.tool_calls[0].function.arguments) == {"place": "Rome"}
try:
    litellm.completion(messages=[{"role": "user", "content": "colour " * 900}], **named)
except litellm.ContextWindowExceededError:
    pass
else:
    raise AssertionError("litellm did not see that the context is too short")
try:
    litellm.completion(messages=hi, model="openai/none", api_base=url, api_key="sk-a")
except litellm.NotFoundError:
    pass
try:
    litellm.completion(messages=hi, model="openai/scripted", api_base=url, api_key="sk-no")
except litellm.AuthenticationError:
    pass

chain = ChatOpenAI(model="scripted", base_url=url, api_key="sk-a")
assert chain.invoke("What colour is it?").content == "Blue it is."
assert "".join(c.content for c in chain.stream("What colour is it?")) == "Blue it is."
assert chain.invoke("What?").usage_metadata["output_tokens"] > 0

class Colour(BaseModel):
    colour: str

assert chain.with_structured_output(Colour).invoke("What colour?") == Colour(colour="blue")
bound = chain.bind_tools([tool], tool_choice="weather")
assert bound.invoke("Weather?").tool_calls[0]["args"] == {"place": "Rome"}
print("all of them")
"""


def answers(request: Request) -> str:
    if request.grammar is None:
        return "Blue it is."
    if "colour" in str(request.grammar):
        return '{"colour": "blue"}'
    return '{"name": "weather", "arguments": {"place": "Rome"}}'


@pytest.mark.proof
@pytest.mark.skipif(CLIENTS is None, reason="TUNESMITH_CLIENTS names no Python with tests/clients.txt (make proof)")
def test_clients_that_others_wrote(tiny_model: Path, tmp_path: Path) -> None:
    script = tmp_path / "others.py"
    script.write_text(OTHERS)
    state = state_of(scripted(answers, HERMES), keys=("sk-a",))
    with running(state) as url, service.running(service.settings(tmp_path, tiny_model)) as api:
        assert CLIENTS is not None
        words = [CLIENTS, script, f"{url}/v1", f"{api.url}/v1", api.secret]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "all of them" in done.stdout, done.stderr[-3000:]


@pytest.mark.proof
@pytest.mark.skipif(not Path(PROMPTFOO).is_file(), reason="TUNESMITH_PROMPTFOO is no promptfoo (make proof)")
def test_promptfoo_evaluates_a_tuned_model(tmp_path: Path) -> None:
    """Chats in plain words, under a schema and with a tool, plain completions, and embeddings that judge them."""
    engine = scripted(answers, HERMES, name=TUNED)
    with running(state_of(engine, keys=("sk-a",))) as url:
        at: dict[str, Any] = {"apiBaseUrl": f"{url}/v1", "apiKey": "sk-a", "max_tokens": 64}
        schema = {"type": "object", "properties": {"colour": {"type": "string"}}, "required": ["colour"]}
        form = {"type": "json_schema", "json_schema": {"name": "c", "schema": schema}}
        tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}

        def model(kind: str, **more: Any) -> dict[str, Any]:
            return {"id": f"openai:{kind}:{TUNED}", "label": f"{kind} {list(more)}", "config": at | more}

        def evaluated(providers: list[Any], *judges: Any) -> list[Any]:
            ask = {"prompts": ["What colour is it?"], "providers": providers, "tests": [{"assert": judges}]}
            (tmp_path / "ask.json").write_text(json.dumps(ask))
            words = [PROMPTFOO, "eval", "--no-cache", "--no-write", "-c", "ask.json", "-o", "out.json"]
            own = {f"PROMPTFOO_{name}": "1" for name in ("DISABLE_TELEMETRY", "DISABLE_UPDATE")}
            own["PROMPTFOO_CONFIG_DIR"] = str(tmp_path)
            done = subprocess.run(
                words, cwd=tmp_path, env=os.environ | own, capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stdout + done.stderr
            found = json.loads((tmp_path / "out.json").read_text())["results"]["results"]
            assert all(one["success"] and one["response"]["tokenUsage"]["total"] for one in found), found
            return [one["response"]["output"] for one in found]

        alike = {"type": "similar", "value": "Blue it is.", "threshold": 0.99, "provider": model("embedding")}
        assert evaluated([model("chat"), model("completion")], alike) == ["Blue it is."] * 2
        told, (call,) = evaluated(
            [model("chat", response_format=form), model("chat", tools=[tool], tool_choice="required")]
        )
        assert told == {"colour": "blue"} and json.loads(call["function"]["arguments"]) == {"place": "Rome"}
    assert len(engine.asked) == 4


@pytest.mark.parametrize("cases", [200, pytest.param(2000, marks=pytest.mark.proof)])
def test_schemathesis_finds_no_server_error(cases: int) -> None:
    with running(state_of(scripted(answers))) as url:
        asked, failures = ask_anything(operations(url), cases)
    assert failures == [] and asked >= cases
