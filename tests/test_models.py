"""Base models: where a name leads, and what is never loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import make_model, write_recipe
from tests.fake_hub import COMMIT, FakeHub
from tests.test_errors import assert_refused
from tunesmith.errors import ModelError
from tunesmith.models.resolve import ResolvedModel, resolve
from tunesmith.models.section import ModelSection

MODELING = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM

pathlib.Path(__file__).parent.joinpath("ran").write_text("")
pathlib.Path({mark!r}).write_text("")

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


def found(name: str | Path, **keys: Any) -> ResolvedModel:
    return resolve(ModelSection(name=str(name), **keys))


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "copy"))


def to_pickle(folder: Path) -> Path:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def test_a_folder_is_known_by_its_content(tiny_model: Path, copy: Path) -> None:
    one, other = found(tiny_model), found(copy)
    assert one.source == "folder" and one.identity == other.identity
    config = json.loads((copy / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
    (copy / "tokenizer_config.json").write_text(json.dumps(config))
    assert found(copy).identity != one.identity


def test_a_folder_beside_the_recipe_goes_before_the_hub(tunesmith: Any, recipe: Any, copy: Path) -> None:
    recipe["model"] = "copy"
    assert tunesmith("check", write_recipe(copy.parent, recipe), "--json").code == 0


def test_pickles_are_refused_with_how_to_convert_them(tunesmith: Any, recipe: Any, copy: Path) -> None:
    recipe["model"] = str(to_pickle(copy))
    path = write_recipe(copy.parent, recipe)
    error = assert_refused(
        tunesmith("check", path, "--json"), "only has pickle weights (pytorch_model.bin)", "never loaded", str(copy)
    )
    command = error["fix"].split('python -c "')[1].split('"')[0]
    exec(command, {})
    assert tunesmith("check", path, f"--set=model={copy}-safe", "--json").code == 0
    # beside safetensors they are left alone
    (copy.with_name("copy-safe") / "pytorch_model.bin").write_bytes(b"never opened")
    assert tunesmith("check", path, f"--set=model={copy}-safe", "--json").code == 0


def test_remote_code_only_runs_when_the_recipe_says_so(tunesmith: Any, recipe: Any, copy: Path) -> None:
    mark = copy.parent / "it-ran"
    (copy / "modeling_own.py").write_text(MODELING.format(mark=str(mark)))
    config = json.loads((copy / "config.json").read_text()) | {
        "model_type": "own_llama",
        "auto_map": {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"},
    }
    (copy / "config.json").write_text(json.dumps(config))
    recipe["model"] = str(copy)
    path = write_recipe(copy.parent, recipe)
    for verb in ("check", "plan", "train"):
        assert_refused(
            tunesmith(verb, path, "--json"),
            "model.trust_remote_code", "brings its own Python code", f"Read the code in {copy}",
        )  # fmt: skip
    assert not mark.exists()
    said = tunesmith("train", path, "--set=model.trust_remote_code=true", "--json")
    assert said.code == 0, said
    assert mark.exists()
    for manifest in ("manifest.json", "train/manifest.json"):
        told = json.loads((copy.parent / "runs/tiny" / manifest).read_text())
        assert (told.get("model") or told["facts"]["model"])["trust_remote_code"] is True
    trusted = found(copy, trust_remote_code=True)
    (copy / "modeling_own.py").write_text(MODELING.format(mark=str(mark)) + "\n# another\n")
    assert found(copy, trust_remote_code=True).identity != trusted.identity


def test_damaged_models(tunesmith: Any, recipe: Any, copy: Path) -> None:
    recipe["model"] = str(copy)
    path = write_recipe(copy.parent, recipe)
    weights = load_file(copy / "model.safetensors")

    save_file({k: v for k, v in weights.items() if "layers.1.mlp.up" not in k}, copy / "model.safetensors")
    assert_refused(tunesmith("train", path, "--json"), str(copy), "lacks 1 of its weights", "layers.1.mlp.up_proj")
    save_file(weights | {"model.norm.weight": torch.ones(7)}, copy / "model.safetensors")
    assert_refused(tunesmith("train", path, "--json"), str(copy), "can't be loaded as a causal language model")
    save_file(weights, copy / "model.safetensors")
    for length in (0, 4, 100, -100):
        whole = (copy / "model.safetensors").read_bytes()
        (copy / "model.safetensors").write_bytes(whole[:length])
        assert_refused(tunesmith("train", path, "--json"), str(copy), "can't be loaded as a causal language model")
        (copy / "model.safetensors").write_bytes(whole)

    for file, told in (
        ("tokenizer.json", "tokenizer can't be loaded"),
        ("generation_config.json", "generation_config.json"),
        ("tokenizer_config.json", "tokenizer_config.json"),
        ("config.json", "config.json"),
    ):
        whole = (copy / file).read_bytes()
        for damage in (whole[: len(whole) // 2], b"[]", b"\xff\xfe"):
            (copy / file).write_bytes(damage)
            assert_refused(tunesmith("check", path, "--json"), str(copy), told)
        (copy / file).write_bytes(whole)
    (copy / "config.json").write_text(json.dumps({"model_type": "no_such_architecture"}))
    assert_refused(tunesmith("train", path, "--json"), str(copy), "no_such_architecture")
    (copy / "config.json").unlink()
    assert_refused(tunesmith("check", path, "--json"), str(copy), "no config.json")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, copy: Path) -> Iterator[FakeHub]:
    """A hub of this machine, as if HF_ENDPOINT had named it before huggingface_hub was imported."""
    from huggingface_hub import constants

    (copy / "README.md").write_text("---\nlicense: mit\n---\n# A card\n")
    pickled = to_pickle(Path(shutil.copytree(copy, tmp_path / "pickled")))
    coded = Path(shutil.copytree(copy, tmp_path / "coded"))
    (coded / "modeling_own.py").write_text(MODELING.format(mark=str(tmp_path / "it-ran")))
    config = json.loads((coded / "config.json").read_text()) | {"auto_map": {"AutoConfig": "modeling_own.OwnConfig"}}
    (coded / "config.json").write_text(json.dumps(config))
    there = {"team/good": copy, "team/pickled": pickled, "team/coded": coded, "team/gated": copy}
    for variable in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    with FakeHub(there, gated={"team/gated"}) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        yield server


def test_a_hub_model_is_fetched_once_and_serves_without_a_network(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    model = found("team/good")
    assert (model.source, model.identity, model.licence, model.hub_id) == ("hub", COMMIT, "mit", "team/good")
    assert (model.path / "model.safetensors").is_file()
    fetched = [a for a in hub.asked if a.startswith("GET /team")]
    assert found("team/good", revision=COMMIT).path == model.path
    assert [a for a in hub.asked if a.startswith("GET /team")] == fetched
    hub.asked.clear()
    with monkeypatch.context() as patch:
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert found("team/good") == model and not hub.asked
        with pytest.raises(ModelError, match="not on this disk") as caught:
            found("team/coded")
        assert "HF_HUB_OFFLINE" in str(caught.value)
    hub.server.close()
    assert found("team/good") == model
    with pytest.raises(ModelError, match="the hub can't be reached"):
        found("team/pickled")


def test_what_the_hub_refuses(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, revision, told in (
        ("team/absent", None, "is not on the hub, or is private"),
        ("team/good", "v9", "has no revision 'v9'"),
        ("team/gated", None, "is gated(.|\n)*HF_TOKEN"),
        ("te am/good", None, "is not a hub id"),
    ):
        with pytest.raises(ModelError, match=told) as caught:
            found(name, revision=revision)
        assert f"model.name: {name}" in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    assert found("team/gated").identity == COMMIT
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ModelError, match="is gated"):
        found("team/gated", revision="main")


def test_pickles_and_code_of_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="only has pickle weights"):
        found("team/pickled")
    assert not any(a.startswith("GET /team") for a in hub.asked)  # refused before anything was fetched
    with pytest.raises(ModelError, match="brings its own Python code"):
        found("team/coded")
    assert not any(a.endswith(".py") for a in hub.asked)
    assert (found("team/coded", trust_remote_code=True).path / "modeling_own.py").is_file()
    assert not (tmp_path / "it-ran").exists()


def test_the_hubs_environment_variables(hub: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME, HF_TOKEN and HF_HUB_OFFLINE, as a person sets them."""
    program = (
        "from tunesmith.models.resolve import resolve; from tunesmith.models.section import ModelSection; "
        "print(resolve(ModelSection(name='team/gated')).path)"
    )
    home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.url}

    def path(**variables: str) -> str:
        command = [sys.executable, "-c", program]
        return subprocess.run(
            command, env=os.environ | home | variables, check=True, capture_output=True, text=True
        ).stdout

    fetched = path(HF_TOKEN=hub.token)
    assert fetched.startswith(str(tmp_path / "home")) and (Path(fetched.strip()) / "model.safetensors").is_file()
    hub.asked.clear()
    assert path(HF_HUB_OFFLINE="1") == fetched and not hub.asked


@pytest.mark.long
def test_the_embedded_model_and_its_gguf_are_one(tunesmith: Any) -> None:
    from tunesmith.models.catalogue import EMBEDDED
    from tunesmith.models.load import load_renderer

    name = "smollm2-135m-instruct"
    one, other = found(name), found(EMBEDDED[name].path(name))
    assert (one.source, other.source) == ("embedded", "gguf")
    assert one.identity == other.identity and one.licence == "apache-2.0"
    assert load_file(one.path / "model.safetensors").keys() == load_file(other.path / "model.safetensors").keys()
    assert load_renderer(one).hash == load_renderer(other).hash
    assert load_renderer(one).template_name == "tokenizer"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt_neox"])
def test_no_weight_is_missed_where_none_is_missing(tmp_path: Path, architecture: str) -> None:
    """Tied weights are not in the file, and are not missing."""
    from tunesmith.models.load import load_model

    model = load_model(found(make_model(tmp_path / architecture, architecture=architecture)), torch.float32)
    assert not model.training
