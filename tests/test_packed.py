"""Packing changes nothing: losses and gradients against plain transformers, and LoRA's step against PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.conftest import make_model
from tunesmith.conversation.render import Rendered
from tunesmith.models import packed
from tunesmith.models.attention import Family, Layout, attention, laid_out
from tunesmith.models.linear import products
from tunesmith.models.packed import PackedForward
from tunesmith.models.packs import best_fit, common_beginning, pack
from tunesmith.models.shapes import rounded
from tunesmith.models.steps import Norm, Products, Rotate, SwiGlu


def rows(shared: int = 0) -> list[Rendered]:
    """Rows of random tokens, the second half of each carrying loss; the first `shared` tokens are the same."""
    random = torch.Generator().manual_seed(0)
    beginning = torch.randint(0, 256, (shared,), generator=random).tolist()
    found = []
    for length in (5, 17, 3, 30, 26, 20):
        ids = torch.randint(0, 256, (length,), generator=random).tolist()
        weights = [0.0] * (shared + length // 2) + [1.0] * (length - length // 2)
        found.append(Rendered(beginning + ids, weights))
    return found


def plain_loss(model: Any, row: Rendered) -> torch.Tensor:
    labels = [i if w else -100 for i, w in zip(row.ids, row.weights, strict=True)]
    out = model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([labels]))
    return out.loss * row.trained


LLAMAS = "2 attentions, 2 gated MLPs, 5 norms"
# What each family is made of, what of it is fused, and what besides when LoRA lies on all linear layers.
FAMILIES: dict[str, tuple[dict[str, Any], str, str]] = {
    "llama": ({}, LLAMAS, "14 LoRA layers"),
    "mistral": ({"sliding_window": 6}, LLAMAS, "14 LoRA layers"),
    "qwen2": ({}, LLAMAS, "14 LoRA layers"),
    "qwen3": ({"head_dim": 8}, "2 attentions, 2 gated MLPs, 9 norms", "14 LoRA layers"),
    "smollm3": ({"no_rope_layer_interval": 2}, LLAMAS, "14 LoRA layers"),
    "gemma": ({"head_dim": 8}, LLAMAS, "14 LoRA layers"),
    "phi3": ({"pad_token_id": 0}, LLAMAS, "8 LoRA layers"),
    "mixtral": ({"num_local_experts": 4}, "2 attentions, 5 norms", "2 LoRA experts, 8 LoRA layers"),
    "falcon": ({"new_decoder_architecture": True, "num_kv_heads": 2}, "2 attentions", "8 LoRA layers"),
    "falcon of one key head": ({"multi_query": True}, "2 attentions", "8 LoRA layers"),
    "falcon of plain heads": (
        {"multi_query": False, "parallel_attn": False, "bias": True},
        "2 attentions",
        "8 LoRA layers",
    ),
    "gpt2": ({}, "2 gelus", "8 LoRA layers"),
    "gpt_neox": ({}, "2 attentions", "8 LoRA layers"),
    "gpt_neox of tanh": ({"hidden_act": "gelu_fast"}, "2 attentions, 2 gelus", "8 LoRA layers"),
    "phi": ({"qk_layernorm": True}, "2 attentions, 2 gelus", "12 LoRA layers"),
}


@pytest.mark.parametrize("architecture", FAMILIES)
@pytest.mark.parametrize(("tied", "shared", "few"), [(True, 0, False), (False, 12, False), (True, 12, True)])
def test_packed_equals_one_row_at_a_time_in_loss_and_every_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, tied: bool, shared: int, few: bool
) -> None:
    monkeypatch.setattr(packed, "few_shapes", lambda *_: few)
    extra, fused, _ = FAMILIES[architecture]
    folder = make_model(tmp_path, architecture=architecture.partition(" ")[0], tie_word_embeddings=tied, **extra)
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    forward = PackedForward(model, rows(shared))
    assert forward.packed, forward.why
    assert forward.why.partition("fused: ")[2] == fused
    batch = forward.pack(rows(shared))
    count = sum(map(len, rows())) + shared
    assert batch.layout.families[0].shared == shared and len(batch.ids_T) == (rounded(count) if few else count)
    hits: list[torch.Tensor] = []
    nll_N = forward.nll(batch, hits=hits)
    assert len(nll_N) == sum(r.trained for r in rows(shared)) == sum(map(len, hits))
    nll_N.sum().backward()
    total = torch.stack([plain_loss(reference, row) for row in rows(shared)]).sum()
    total.backward()
    torch.testing.assert_close(nll_N.sum(), total, rtol=1e-5, atol=1e-4)
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_rows_that_belong_together_share_their_own_beginning(tmp_path: Path, architecture: str) -> None:
    """As the prompt of two answers: computed once a pair, and still the losses and gradients of single rows."""
    folder = make_model(tmp_path, architecture=architecture, **FAMILIES[architecture][0])
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    random = torch.Generator().manual_seed(3)
    made = []
    for prompt, endings in ((20, (5, 9)), (3, (7, 4)), (33, (1, 30))):
        begun = torch.randint(3, 200, (prompt,), generator=random).tolist()
        for n in endings:
            ids = begun + torch.randint(3, 200, (n,), generator=random).tolist()
            made.append(Rendered(ids, [0.0] * prompt + [1.0] * n))
    forward = PackedForward(model, made[:2])
    batch = forward.pack(made, sizes=(2, 2, 2))
    assert [family.shared for family in batch.layout.families] == [20, 0, 33]
    losses_S = torch.zeros(6).index_add(0, batch.owner_N, forward.nll(batch))
    expected_S = torch.stack([plain_loss(reference, row) for row in made])
    torch.testing.assert_close(losses_S, expected_S, rtol=1e-4, atol=1e-4)
    (losses_S * torch.arange(1, 7)).sum().backward()
    (expected_S * torch.arange(1, 7)).sum().backward()
    found = dict(model.named_parameters())
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=2e-3, msg=name)


def test_a_model_that_packing_would_change_is_found_out(tmp_path: Path) -> None:
    """State-space layers carry a state across rows; soft caps and ALiBi are not part of the attention here."""
    mamba = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "a", architecture="mamba"), dtype=torch.float32)
    capped = make_model(tmp_path / "b", architecture="gemma2", head_dim=8, attn_logit_softcapping=1.0)
    biased = make_model(tmp_path / "c", architecture="falcon", alibi=True)
    others = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in (capped, biased)]
    for model in (mamba, *others):
        forward = PackedForward(model, rows(12))
        assert not forward.packed and "one row at a time" in forward.why
        nll_N = forward.nll(forward.pack(rows(12)))
        total = torch.stack([plain_loss(model, row) for row in rows(12)]).sum()
        torch.testing.assert_close(nll_N.sum(), total, rtol=1e-4, atol=1e-4)


def test_rows_one_at_a_time_have_few_logits_in_memory(tmp_path: Path) -> None:
    """Whatever the row's length: the output layer is asked for a chunk of tokens after the other."""
    mamba = AutoModelForCausalLM.from_pretrained(make_model(tmp_path, architecture="mamba"), dtype=torch.float32)
    ids = torch.randint(0, 256, (600,), generator=torch.Generator().manual_seed(0)).tolist()
    row = Rendered(ids, [0.0] + [1.0] * 599)
    forward = PackedForward(mamba, [row])
    assert not forward.packed
    expected = plain_loss(mamba, row)
    sizes: list[int] = []
    mamba.lm_head.register_forward_hook(lambda module, given, out: sizes.append(out[..., 0].numel()))
    found = forward.nll(forward.pack([row])).sum()
    assert sizes and max(sizes) <= 256
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    one, other = (torch.autograd.grad(total, mamba.lm_head.weight)[0] for total in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_a_model_that_wants_more_than_text_is_refused(tiny_model: Path) -> None:
    from tunesmith.errors import ModelError

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = model.forward

    def wants_pictures(pixels: Any = None, **given: Any) -> Any:
        if pixels is None:
            raise ValueError("You have to specify pixel_values")
        return plain(**given)

    model.forward = wants_pictures
    with pytest.raises(ModelError, match=r"llama can't read tokens alone .*pixel_values"):
        PackedForward(model, rows(12))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_with_a_head_of_classes_is_packed_as_well(tmp_path: Path, dtype: torch.dtype) -> None:
    """Its rows' scores are transformers' own; a model that packing would change is found out here too."""
    from peft import LoraConfig, get_peft_model

    def scorer(architecture: str, **settings: Any) -> Any:
        folder = make_model(tmp_path / architecture, architecture=architecture, **settings)
        model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, num_labels=3).eval()
        return get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))

    given = rows(12)
    for model, is_packed in ((scorer("llama"), True), (scorer("gemma2", attn_logit_softcapping=1.0), False)):
        expected = torch.cat([model(input_ids=torch.tensor([row.ids])).logits.float() for row in given]).detach()
        forward = PackedForward(model, given)
        assert forward.packed is is_packed, forward.why
        off = 0.3 if dtype == torch.bfloat16 else 1e-4
        torch.testing.assert_close(forward.scores(forward.pack(given)), expected, rtol=1e-2, atol=off)


def test_filled_up_packs_have_few_shapes() -> None:
    """What bfloat16 products are compiled for; and filling costs little."""
    random = torch.Generator().manual_seed(0)
    shapes, tokens, laid = set(), 0, 0
    for _ in range(200):
        lengths = torch.randint(20, 90, (12,), generator=random).tolist()
        batch = pack(
            [Rendered([1] * 30 + [2 + i] * n, [0.0] * 30 + [1.0] * n) for i, n in enumerate(lengths)], few=True
        )
        shapes |= {(len(batch.ids_T),)} | {(g.rows, g.length, g.before) for g in batch.layout.groups(None)[0]}
        tokens, laid = tokens + 30 + sum(lengths), laid + len(batch.ids_T)
    assert len(shapes) < 60
    assert laid < 1.08 * tokens


@pytest.mark.parametrize("window", [None, 6, 64])
def test_rows_one_by_one_have_few_shapes_too(monkeypatch: pytest.MonkeyPatch, window: int | None) -> None:
    """Each is filled up behind its end, which no token sees: the same outputs and gradients."""
    families = [Family(5, [13, 40, 35]), Family(0, [21]), Family(0, [30])]
    tokens = 5 + 13 + 40 + 35 + 21 + 30
    torch.manual_seed(0)
    q, k, v, up = double(tokens, 4, 8), double(tokens, 2, 8), double(tokens, 2, 8), torch.randn(tokens, 4, 8)
    shapes: set[tuple[int, ...]] = set()
    plain = F.scaled_dot_product_attention

    def noted(q: torch.Tensor, k: torch.Tensor, *more: Any, **keys: Any) -> torch.Tensor:
        shapes.add((q.shape[2], k.shape[2]))
        return plain(q, k, *more, **keys)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    found = []
    for few in (False, True):
        shapes.clear()
        with laid_out(Layout(families, few=few), "rows"):
            out = attention(q, k, v, 8**-0.5, window)
        found.append([out, *torch.autograd.grad((out * up).sum(), (q, k, v))])
    assert shapes == {(16, 16), (16, 21), (48, 53), (32, 32)}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def double(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def test_the_written_out_steps_have_the_right_gradients() -> None:
    torch.manual_seed(0)
    check = torch.autograd.gradcheck
    x, up, down = double(5, 4), double(3, 2), double(2, 4)
    weights, bias = [double(3, 4), double(6, 4)], double(3)

    def two(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, a: torch.Tensor, up: torch.Tensor, v: torch.Tensor):
        return Products.apply(x, [0.7, None], [None, None], w, b, a, up, v, None, None, None)

    assert check(two, (x, weights[0], bias, down, up, weights[1]))
    one = two(x, weights[0], bias, down, up, weights[1])[0]
    torch.testing.assert_close(one, x @ weights[0].T + bias + 0.7 * x @ down.T @ up.T)
    assert check(SwiGlu.apply, (double(3, 4), double(3, 4)))
    angles = torch.rand(5, 1, 3, dtype=torch.float64)
    for width in (6, 9):  # of nine, three are not turned
        assert check(lambda x: Rotate.apply(x, angles.cos(), angles.sin()), (double(5, 2, width),))
    assert torch.equal(Rotate.apply(up_to_9 := double(5, 2, 9), angles.cos(), angles.sin())[..., 6:], up_to_9[..., 6:])


def test_the_norms_step_equals_torchs() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(6, 8, requires_grad=True), torch.randn(8, requires_grad=True)
    found, expected = Norm.apply(x, w, 1e-5), torch.nn.functional.rms_norm(x, (8,), w, 1e-5)
    torch.testing.assert_close(found, expected)
    g = torch.randn(6, 8)
    for mine, theirs in zip(
        torch.autograd.grad(found, (x, w), g), torch.autograd.grad(expected, (x, w), g), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def with_lora(folder: Path, dtype: torch.dtype, targets: list[str] | None = None) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    on = {"target_modules": [], "target_parameters": targets} if targets else {"target_modules": "all-linear"}
    return get_peft_model(base, LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, **on))


def gradients(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.grad.float() for n, p in model.named_parameters() if p.requires_grad}


def lora_steps(folder: Path, given: list[Rendered], dtype: torch.dtype, targets: list[str] | None = None) -> list[Any]:
    """What fused packed rows and PEFT's own rows one by one in float32 come to: loss, gradients; what was fused."""
    fused, plain = with_lora(folder, dtype, targets), with_lora(folder, torch.float32, targets)
    forward = PackedForward(fused, given)
    losses = [forward.nll(forward.pack(given)).sum(), torch.stack([plain_loss(plain, row) for row in given]).sum()]
    for loss in losses:
        loss.backward()
    return [*losses, gradients(fused), gradients(plain), forward.why.partition("fused: ")[2]]


@pytest.mark.parametrize("architecture", FAMILIES)
def test_fused_lora_equals_pefts(tmp_path: Path, architecture: str) -> None:
    extra, told, lora = FAMILIES[architecture]
    folder = make_model(tmp_path, architecture=architecture.partition(" ")[0], **extra)
    found, expected, mine, theirs, fused = lora_steps(folder, rows(12), torch.float32)
    assert fused == f"{lora}, {told}"
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


EXPERTS = ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]


@pytest.mark.parametrize("targets", [EXPERTS, EXPERTS[:1], EXPERTS[1:]])
@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_fused_lora_on_experts_equals_pefts(tmp_path: Path, architecture: str, targets: list[str]) -> None:
    counts = {"mixtral": {"num_local_experts": 4}, "qwen3_moe": {"num_experts": 8, "num_experts_per_tok": 3}}
    folder = make_model(tmp_path, architecture=architecture, moe_intermediate_size=24, **counts[architecture])
    found, expected, mine, theirs, fused = lora_steps(folder, rows(12), torch.float32, targets)
    assert fused.startswith("2 LoRA experts, 2 attentions")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    for name, gradient in theirs.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("architecture", ["llama", "gemma", "phi3", "mixtral", "falcon", "gpt2", "gpt_neox", "phi"])
def test_in_bfloat16_gradients_point_where_those_of_float32_do(tmp_path: Path, architecture: str) -> None:
    """As far as three digits go; and with experts, whose choice a rounded router may change, on their matrices too."""
    extra, _, _ = FAMILIES[architecture]
    folder = make_model(tmp_path, architecture=architecture, initializer_range=0.1, **extra)
    for targets in [None, EXPERTS] if architecture == "mixtral" else [None]:
        found, expected, mine, theirs, fused = lora_steps(folder, rows(12), torch.bfloat16, targets)
        assert "LoRA" in fused
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0.0)
        flat = [torch.cat([side[name].flatten() for name in theirs]) for side in (mine, theirs)]
        assert F.cosine_similarity(*flat, 0) > (0.95 if architecture == "mixtral" else 0.99)


def test_small_updates_do_not_vanish_in_bfloat16() -> None:
    """An update below the last digit of what it is added to: ours arrives in the mean; added later it is lost."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    rounded = torch.nn.Sequential(torch.nn.Linear(64, 64, bias=False)).bfloat16()
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(rounded, config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.base_layer.weight.normal_(0, 1.5)
        for part in (layer.lora_A, layer.lora_B):
            part["default"].weight.normal_(0, 0.009)
        x = torch.randn(512, 64).bfloat16()
        without = layer.base_layer(x).float()
        down, up = (part["default"].weight.float() for part in (layer.lora_A, layer.lora_B))
        update = x.float() @ down.T @ up.T * layer.scaling["default"]
        shares = [
            float(((y.float() - without) * update).sum() / update.square().sum())
            for y in (products(x, [layer])[0], layer(x))
        ]
    assert shares[0] == pytest.approx(1, abs=0.2)
    assert shares[1] < 0.5  # why PEFT's order of adding is not ours


def test_rows_too_long_to_keep_their_probabilities_give_the_same(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for longest in (4, 512):
        monkeypatch.setattr("tunesmith.models.attention.LONGEST_KEPT", longest)
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        forward = PackedForward(model, rows(12))
        loss = forward.nll(forward.pack(rows(12))).sum()
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_what_rows_share_stops_at_the_first_token_that_differs_or_is_learnt() -> None:
    alike = list(range(20))
    one, other = Rendered([*alike, 1, 2], [0.0] * 22), Rendered([*alike, 3], [0.0] * 21)
    assert common_beginning([one, other]) == 20
    assert common_beginning([one]) == 0
    assert common_beginning([one, Rendered(alike, [0.0] * 20)]) == 19  # a token is left of each row
    assert common_beginning([one, Rendered([*alike, 3], [0.0] * 10 + [1.0] * 11)]) == 10
    assert common_beginning([one, Rendered([*alike[:5], 9, *alike[6:]], [0.0] * 20)]) == 0  # too little to gain


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 100), max_size=40), st.integers(1, 120))
def test_best_fit_places_every_row_once_and_overfills_nothing(lengths: list[int], capacity: int) -> None:
    groups = best_fit(lengths, capacity)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    assert all(len(g) == 1 or sum(lengths[i] for i in g) <= capacity for g in groups)
    half_empty = [g for g in groups if sum(lengths[i] for i in g) * 2 <= capacity]
    assert len(half_empty) <= 1  # two such groups would have fitted into one


LONG_ROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
EASILY_WRONG: dict[str, dict[str, Any]] = {
    "olmo": {"clip_qkv": 0.5},
    "gemma3_text": {"head_dim": 8, "final_logit_softcapping": 1.0, "sliding_window": 16},
    "granite": {"logits_scaling": 2.0},
    "phimoe": {"sliding_window": 48, "num_local_experts": 4},
    "phi3": {
        "pad_token_id": 0,
        "rope_parameters": LONG_ROPE | {"original_max_position_embeddings": 64},
        "original_max_position_embeddings": 64,
    },
    "llama": {
        "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        "max_position_embeddings": 64,
    },
    "ministral3": {
        "head_dim": 8,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 48,
            "llama_4_scaling_beta": 0.5,
        },
    },
    "seed_oss": {"head_dim": 8, "residual_dropout": 0.5},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
}


@pytest.mark.parametrize("architecture", EASILY_WRONG)
def test_what_short_rows_would_not_show_is_right_in_long_ones(tmp_path: Path, architecture: str) -> None:
    """Scales and caps after the output layer, limits within attention, angles by length, windows in the mask."""
    folder = make_model(tmp_path, architecture=architecture, **EASILY_WRONG[architecture])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(2)
    beginning = torch.randint(3, 200, (9,), generator=random).tolist()
    made = [beginning + torch.randint(3, 200, (n,), generator=random).tolist() for n in (20, 140, 31)]
    given = [Rendered(ids, [0.0] * 9 + [1.0] * (len(ids) - 9)) for ids in made]
    total = torch.stack([plain_loss(model, row) for row in given])
    forward = PackedForward(model, given[:1] + given[2:])
    for group in ([given[0], given[2]], given):
        batch = forward.pack(group)
        found = torch.zeros(len(group)).index_add(0, batch.owner_N, forward.nll(batch))
        expected = total if len(group) == 3 else total[[0, 2]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_lora_on_the_output_layer_is_trained_and_counted(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    config = LoraConfig(r=4, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    model = get_peft_model(base, config)
    expected = torch.stack([plain_loss(model, row) for row in rows()]).sum()
    forward = PackedForward(model, rows())
    found = forward.nll(forward.pack(rows())).sum()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    found.backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "lm_head.lora" in n)
