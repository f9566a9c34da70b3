"""Packing changes nothing: losses and gradients against plain transformers, and LoRA's step against PEFT's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from tests.conftest import make_model
from tunesmith.conversation.render import Rendered
from tunesmith.models.packed import PackedForward, best_fit, common_beginning
from tunesmith.train.adapters.fused import LoraProduct, fuse


def rows(shared: int = 0) -> list[Rendered]:
    """Rows of random tokens, the second half of each carrying loss; the first `shared` tokens are the same."""
    random = torch.Generator().manual_seed(0)
    beginning = torch.randint(0, 256, (shared,), generator=random).tolist()
    found = []
    for length in (5, 17, 3, 30):
        ids = torch.randint(0, 256, (length,), generator=random).tolist()
        weights = [0.0] * (shared + length // 2) + [1.0] * (length - length // 2)
        found.append(Rendered(beginning + ids, weights))
    return found


def plain_loss(model: Any, row: Rendered) -> torch.Tensor:
    labels = [i if w else -100 for i, w in zip(row.ids, row.weights, strict=True)]
    out = model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([labels]))
    return out.loss * row.trained


@pytest.mark.parametrize(
    ("architecture", "extra"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 8}),
        ("mistral", {"sliding_window": 6}),
        ("gemma", {"head_dim": 8}),
        ("gpt2", {}),
    ],
)
@pytest.mark.parametrize(("tied", "shared"), [(True, 0), (False, 12)])
def test_packed_equals_one_row_at_a_time_in_loss_and_every_gradient(
    tmp_path: Path, architecture: str, extra: dict[str, Any], tied: bool, shared: int
) -> None:
    folder = make_model(tmp_path, architecture=architecture, tie_word_embeddings=tied, **extra)
    model, reference = (AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for _ in range(2))
    forward = PackedForward(model, rows(shared))
    assert forward.packed, forward.why
    batch = forward.pack(rows(shared))
    assert batch.layout.shared == shared and len(batch.ids_T) == sum(map(len, rows())) + shared
    nll_N = forward.nll(batch)
    assert len(nll_N) == sum(r.trained for r in rows(shared))
    nll_N.sum().backward()
    total = torch.stack([plain_loss(reference, row) for row in rows(shared)]).sum()
    total.backward()
    torch.testing.assert_close(nll_N.sum(), total, rtol=1e-5, atol=1e-4)
    expected = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-4, msg=name)


def test_a_model_that_packing_would_change_is_found_out(tmp_path: Path) -> None:
    """State-space layers carry a state across rows; soft caps are not part of the attention here."""
    mamba = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "a", architecture="mamba"), dtype=torch.float32)
    capped = make_model(tmp_path / "b", architecture="gemma2", head_dim=8, attn_logit_softcapping=1.0)
    for model in (mamba, AutoModelForCausalLM.from_pretrained(capped, dtype=torch.float32)):
        forward = PackedForward(model, rows(12))
        assert not forward.packed and "one row at a time" in forward.why
        nll_N = forward.nll(forward.pack(rows(12)))
        total = torch.stack([plain_loss(model, row) for row in rows(12)]).sum()
        torch.testing.assert_close(nll_N.sum(), total, rtol=1e-4, atol=1e-4)


def test_loras_step_has_the_right_gradients() -> None:
    torch.manual_seed(0)
    x, a, b = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (2, 4), (3, 2)))
    weight, bias = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *t: LoraProduct.apply(t[0], weight, bias, t[1], t[2], 0.7), (x, a, b))


def test_fused_lora_equals_pefts(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model

    sides = []
    for fused in (True, False):
        torch.manual_seed(3)
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        model = get_peft_model(
            base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        )
        if fused:
            assert fuse(model) == 14
        loss = torch.stack([plain_loss(model, row) for row in rows()]).sum()
        loss.backward()
        sides.append((loss, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    torch.testing.assert_close(sides[0][0], sides[1][0], rtol=1e-5, atol=1e-5)
    for name, gradient in sides[1][1].items():
        torch.testing.assert_close(sides[0][1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)


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
