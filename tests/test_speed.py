"""Short ways that can be turned off: the same losses and gradients, and what is chosen where."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import make_model, write_recipe
from tunesmith.runs import read_jsonl

WAYS: dict[str, dict[str, Any]] = {
    "no packing": {"packing": False},
    "no sharing": {"shared": False},
    "nothing fused": {"fused": False},
    "attention by rows": {"attention": "rows"},
    "recompute": {"activations": "recompute"},
    "offload": {"activations": "offload"},
    "recompute, row by row": {"activations": "recompute", "packing": False},
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    "adapter", [{"kind": "lora", "rank": 4, "dropout": 0.2}, {"kind": "partial", "last_layers": 1}]
)
def test_each_way_gives_the_same_run(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, name: str, adapter: dict[str, Any]
) -> None:
    if adapter["kind"] == "lora" and ("packing" in WAYS[name] or "shared" in WAYS[name]):
        adapter = adapter | {"dropout": 0.0}  # its masks fall otherwise on tokens that lie otherwise
    recipe["train"] |= {"adapter": adapter, "max_steps": 3, "speed": "auto"}
    path = write_recipe(tmp_path, recipe)
    said = tunesmith("train", path)
    assert said.code == 0 and "speed: float32, rows packed, shared beginnings once" in said.err.replace("\n", " ")
    recipe["train"]["speed"] = WAYS[name]
    assert tunesmith("train", write_recipe(tmp_path, recipe | {"name": "other"})).code == 0
    one, other = (read_jsonl(tmp_path / f"runs/{run}/metrics.jsonl") for run in ("tiny", "other"))
    for a, b in zip(one, other, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    told = [json.loads((tmp_path / f"runs/{r}/train/manifest.json").read_text())["summary"] for r in ("tiny", "other")]
    assert told[0]["speed"] != told[1]["speed"]
    if name == "recompute":  # the same products, once more: not one digit differs
        assert [line["grad_norm"] for line in one] == [line["grad_norm"] for line in other]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "gpt_neox"])
def test_recomputed_layers_keep_little_and_give_the_same_gradients(tmp_path: Path, architecture: str) -> None:
    from transformers import AutoModelForCausalLM

    from tunesmith.conversation.render import Rendered
    from tunesmith.models.packed import PackedForward
    from tunesmith.models.ways import Ways

    path = make_model(tmp_path / "m", architecture=architecture, num_hidden_layers=4, head_dim=8)
    shared = list(range(5, 20))
    rows = [Rendered(shared + list(range(20, 60 + 3 * i)), [0.0] * 20 + [1.0] * (35 + 3 * i)) for i in range(3)]
    gradients, kept = {}, {}
    for activations in ("keep", "recompute", "offload"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(path)
        forward = PackedForward(model, rows, ways=Ways(activations=activations))
        assert forward.packed
        model.train()
        sizes: dict[int, int] = {}

        def count(t: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[t.data_ptr()] = t.numel() * t.element_size()
            return t

        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            loss = forward.nll(forward.pack(rows)).sum()
        own = {p.data_ptr() for p in model.parameters()}
        kept[activations] = sum(size for at, size in sizes.items() if at not in own)
        loss.backward()
        gradients[activations] = [p.grad for p in model.parameters()]
    assert kept["recompute"] < 0.35 * kept["keep"]
    for activations in ("recompute", "offload"):
        for a, b in zip(gradients["keep"], gradients[activations], strict=True):
            assert torch.equal(a, b)


def test_a_model_without_such_layers_is_refused(tmp_path: Path) -> None:
    from tunesmith.errors import ModelError
    from tunesmith.models.activations import recompute_layers

    with pytest.raises(ModelError, match="no layers that can be computed again"):
        recompute_layers(torch.nn.Linear(2, 2))


def test_what_does_not_compile_runs_plain(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tunesmith.models import pieces

    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler here")

    monkeypatch.setattr(torch, "compile", broken)
    recipe["train"] |= {"max_steps": 1, "speed": {"compile": True}}
    said = tunesmith("train", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0 and "not compiled: no C++ compiler here" in said.json["train"]["forward"]
    assert pieces.now == pieces.PLAIN and "compiled pieces" not in said.json["train"]["speed"]


@pytest.mark.long
def test_compiled_pieces_give_the_same_run(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    from tunesmith.models import pieces

    recipe["train"] |= {"adapter": "full", "max_steps": 3}
    assert tunesmith("train", write_recipe(tmp_path, recipe)).code == 0
    recipe |= {"name": "other", "train": recipe["train"] | {"speed": {"compile": True}}}
    try:
        said = tunesmith("train", write_recipe(tmp_path, recipe), "--json")
        assert said.code == 0 and "compiled pieces" in said.json["train"]["speed"]
    finally:
        pieces.now.update(pieces.PLAIN)
    one, other = (read_jsonl(tmp_path / f"runs/{run}/metrics.jsonl") for run in ("tiny", "other"))
    assert [a["loss"] for a in one] == pytest.approx([b["loss"] for b in other], rel=1e-4)


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "installed", "chosen"),
    [
        ("auto", "cpu", torch.float32, {"flash_attn"}, "grouped"),
        ("auto", "cuda:0", torch.bfloat16, {"flash_attn"}, "flash"),
        ("auto", "cuda:0", torch.float32, {"flash_attn"}, "flex"),
        ("auto", "cuda:0", torch.bfloat16, set(), "flex"),
        ("rows", "cuda:0", torch.bfloat16, {"flash_attn"}, "rows"),
        ("flash", "cpu", torch.bfloat16, {"flash_attn"}, None),
        ("flash", "cuda:0", torch.bfloat16, set(), None),
        ("flex", "cpu", torch.float32, set(), None),
    ],
)
def test_the_attention_is_chosen_by_what_is_there(
    wanted: str, device: str, dtype: torch.dtype, installed: set[str], chosen: str | None
) -> None:
    from tunesmith.errors import MachineError
    from tunesmith.models.cuda import choose_attention, liger_there

    if chosen is None:
        with pytest.raises(MachineError, match=r"needs .*CUDA"):
            choose_attention(wanted, device, dtype, installed.__contains__)
    else:
        assert choose_attention(wanted, device, dtype, installed.__contains__) == chosen
    assert liger_there(True, device, {"liger_kernel"}.__contains__) == (device != "cpu")
    assert not liger_there(False, device, {"liger_kernel"}.__contains__)


@pytest.mark.parametrize("window", [None, 4])
def test_the_layouts_of_flash_and_flex_attention_are_those_of_ours(window: int | None) -> None:
    """Their masks and their rows' keys, put through torch's own attention, on two families that begin alike."""
    import torch.nn.functional as F

    from tunesmith.models.attention import Family, Layout, attention, laid_out
    from tunesmith.models.cuda import lengths, sees

    torch.manual_seed(0)
    layout = Layout([Family(5, [3, 7]), Family(0, [6]), Family(4, [2, 2, 5])])
    total = layout.spans[-1].start + layout.spans[-1].length
    q, k, v = torch.randn(total, 4, 8), torch.randn(total, 2, 8), torch.randn(total, 2, 8)
    with laid_out(layout):
        expected = attention(q, k, v, 0.3, window)
    at = torch.arange(total)
    mask = sees(layout, window)(torch.tensor(0), torch.tensor(0), at[:, None], at[None])
    heads = [x.transpose(0, 1)[None] for x in (q, k, v)]
    by_mask = F.scaled_dot_product_attention(*heads, mask, scale=0.3, enable_gqa=True)[0].transpose(0, 1)
    torch.testing.assert_close(by_mask, expected)

    keys, ends_q, ends_k, longest_q, longest_k = lengths(layout)
    assert (longest_q, longest_k) == (7, 12)
    assert ends_q.dtype == ends_k.dtype == torch.int32
    found = []
    for (a, b), (c, d) in zip(ends_q.unfold(0, 2, 1).tolist(), ends_k.unfold(0, 2, 1).tolist(), strict=True):
        row_k, row_v = (x.index_select(0, keys[c:d]).transpose(0, 1)[None] for x in (k, v))
        last = torch.arange(d - c - (b - a), d - c)[:, None]
        seen = (torch.arange(d - c) <= last) & ((last - torch.arange(d - c) < window) if window else True)
        row_q = q[a:b].transpose(0, 1)[None]
        out = F.scaled_dot_product_attention(row_q, row_k, row_v, seen, scale=0.3, enable_gqa=True)
        found.append(out[0].transpose(0, 1))
    torch.testing.assert_close(torch.cat(found), expected)


def by_blocks(q: Any, k: Any, v: Any, block_mask: Any, scale: float, enable_gqa: bool) -> Any:
    """flex attention's result by torch's own: of the blocks that the mask names, what its rule lets be seen."""
    import torch.nn.functional as F

    at, blocks = torch.arange(q.shape[2]), block_mask.to_dense()[0, 0].bool()
    seen = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), at[:, None], at[None])
    named = blocks[at[:, None] // 128, at[None] // 128]
    return F.scaled_dot_product_attention(q, k, v, seen & named, scale=scale, enable_gqa=enable_gqa)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("kernel", ["stand-in", pytest.param("torch's", marks=pytest.mark.long)])
@pytest.mark.parametrize("window", [None, 40])
def test_flex_attention_is_ours_and_its_mask_is_made_once_a_pack(
    monkeypatch: pytest.MonkeyPatch, window: int | None, kernel: str
) -> None:
    """The whole path but for the compiler, over several of flex's blocks; and which blocks it leaves out."""
    from torch.nn.attention import flex_attention as flexes

    from tunesmith.models import cuda
    from tunesmith.models.attention import Family, Layout, attention, laid_out

    made, make = [], flexes.create_block_mask
    monkeypatch.setattr(
        flexes, "create_block_mask", lambda *given, **more: made.append(make(*given, **more)) or made[-1]
    )
    monkeypatch.setattr(cuda, "_flex", [by_blocks if kernel == "stand-in" else flexes.flex_attention])
    torch.manual_seed(0)
    layout = Layout([Family(130, [30, 170]), Family(0, [60]), Family(20, [5, 128, 40])], padding=9)
    q, k, v = torch.randn(layout.tokens, 4, 16), torch.randn(layout.tokens, 2, 16), torch.randn(layout.tokens, 2, 16)
    for _ in range(2):  # two layers
        with laid_out(layout):
            expected = attention(q, k, v, 0.3, window)
        with laid_out(layout, "flex"):
            torch.testing.assert_close(attention(q, k, v, 0.3, window), expected, rtol=1e-4, atol=1e-5)
    assert len(made) == 1
    blocks = made[0].to_dense()[0, 0].sum().item()
    assert 5 < blocks < 15  # of five times five: fewer than all that lie before


def test_flash_attention_is_told_each_packs_rows_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in with flash-attn's signature, by torch's own attention row by row."""
    import torch.nn.functional as F

    from tunesmith.models import cuda
    from tunesmith.models.attention import Family, Layout, attention, laid_out

    def varlen(
        q: Any, k: Any, v: Any, *, cu_seqlens_q: Any, cu_seqlens_k: Any, softmax_scale: float, **more: Any
    ) -> Any:
        assert more["causal"] and more["window_size"] == (-1, -1)
        ends = [x.unfold(0, 2, 1).tolist() for x in (cu_seqlens_q, cu_seqlens_k)]
        found = []
        for (a, b), (c, d) in zip(*ends, strict=True):
            assert b - a <= more["max_seqlen_q"] and d - c <= more["max_seqlen_k"]
            seen = torch.ones(b - a, d - c, dtype=torch.bool).tril(d - c - (b - a))
            heads = [x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d])]
            found.append(F.scaled_dot_product_attention(*heads, seen, scale=softmax_scale, enable_gqa=True)[0])
        return torch.cat(found, 1).transpose(0, 1)

    made, make = [], cuda.lengths
    monkeypatch.setattr(cuda, "lengths", lambda layout: made.append(make(layout)) or made[-1])
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_varlen_func=varlen))
    torch.manual_seed(0)
    layout = Layout([Family(5, [3, 7]), Family(0, [6]), Family(4, [2, 2, 5])], padding=3)
    q, k, v = torch.randn(layout.tokens, 4, 8), torch.randn(layout.tokens, 2, 8), torch.randn(layout.tokens, 2, 8)
    for _ in range(2):
        with laid_out(layout):
            expected = attention(q, k, v, 0.3)
        with laid_out(layout, "flash"):
            torch.testing.assert_close(attention(q, k, v, 0.3), expected)
    assert len(made) == 1


# A machine with CUDA, as it was probed: what it sets, before torch is there, beside what a user has set.
ON_CUDA = """
import os, sys
from tunesmith.models import machine

machine._probe = lambda cores: machine.Machine("x", cores, "cuda", "bfloat16", {}, None)
for given in (None, "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        os.environ.pop(name, None)
    if given:
        os.environ[given] = "max_split_size_mb:64"
    machine.machine.cache_clear()
    machine.machine()
    print(os.environ.get("PYTORCH_ALLOC_CONF"))
assert "torch" not in sys.modules
"""


def test_on_cuda_one_process_too_has_segments_that_grow(tmp_path: Path) -> None:
    environment = os.environ | {"TUNESMITH_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", ON_CUDA], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["expandable_segments:True", "max_split_size_mb:64", "None"], done.stderr


def test_plan_counts_recomputed_layers(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    path, told = write_recipe(tmp_path, recipe), {}
    for activations in ("keep", "recompute", "offload"):
        said = tunesmith("plan", path, "--set", f"train.speed.activations={activations}", "--json")
        told[activations] = said.json["memory"]["activations"]
    assert told["keep"] > told["recompute"] > told["offload"] > 0


@pytest.mark.parametrize("wanted", [True, False])
def test_ligers_kernels_can_be_turned_off(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    """Where a machine says it has them they are tried and, as they can't run here, fallen back from; or not tried."""
    from tunesmith.models import fused, packed

    tried = []

    def liger(*given: Any) -> Any:
        tried.append(given)
        raise ImportError("no kernels here")

    monkeypatch.setattr(packed, "liger_there", lambda asked, device: asked)
    monkeypatch.setattr(fused, "LIGER_NORMS", [liger])
    recipe["train"] |= {"max_steps": 1, "speed": {"liger": wanted}}
    said = tunesmith("train", write_recipe(tmp_path, recipe), "--json")
    assert said.code == 0 and "5 norms" in said.json["train"]["forward"], said.err
    assert bool(tried) == wanted


def test_the_optimizers_fused_step_can_be_turned_off(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same weights, by the steps that torch takes one operation at a time."""
    from safetensors.torch import load_file

    asked: set[bool] = set()
    adamw = torch.optim.AdamW

    def made(*given: Any, **keys: Any) -> Any:
        asked.add(keys["fused"])
        return adamw(*given, **keys)

    monkeypatch.setattr(torch.optim, "AdamW", made)
    ends = []
    for name, fused in (("tiny", True), ("other", False)):
        recipe["train"]["optimizer"] = {"kind": "adamw", "fused": fused}
        assert tunesmith("train", write_recipe(tmp_path, recipe | {"name": name})).code == 0
        told = json.loads((tmp_path / f"runs/{name}/train/manifest.json").read_text())["summary"]
        assert (", fused" in told["speed"][-1]) == fused, told["speed"]
        ends.append(load_file(tmp_path / f"runs/{name}/train/adapter/adapter_model.safetensors"))
    assert asked == {True, False}
    for name, weight in ends[0].items():
        torch.testing.assert_close(ends[1][name], weight, rtol=1e-3, atol=2e-5, msg=name)


def test_unknown_ways_are_refused(tunesmith: Any, recipe: dict[str, Any], tmp_path: Path) -> None:
    said = tunesmith("train", write_recipe(tmp_path, recipe), "--set", "train.speed.fussed=false")
    assert said.code == 2 and "did you mean 'fused'" in said.err
    said = tunesmith("train", write_recipe(tmp_path, recipe), "--set", "train.speed.attention=flash")
    assert said.code == 2 and "needs CUDA" in said.err
