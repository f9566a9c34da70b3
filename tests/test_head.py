"""The output layer's loss in bounded memory: what is in use at once, and what is kept for the gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tunesmith.models import head as module
from tunesmith.models.head import head_nll, tokens_at_once

N, D = 600, 8
SMALL, LARGE, LOGITS = 2**12, 2**14, 2**20  # all a sixteenth of the real ones


def in_use(act: Callable[[], object]) -> tuple[int, int]:
    """Bytes that torch has on the CPU beyond what it had before: the most, and what is left."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = act()
    now = most = 0
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    del kept
    return most, now


def made(vocabulary: int, trained: bool) -> tuple[Tensor, torch.nn.Linear, Tensor]:
    torch.manual_seed(0)
    head = torch.nn.Linear(D, vocabulary, bias=False).requires_grad_(trained)
    return torch.randn(N, D, requires_grad=True), head, torch.randint(0, vocabulary, (N,))


@pytest.mark.parametrize("trained", [False, True])
def test_the_losss_memory_does_not_grow_with_the_vocabulary(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    monkeypatch.setattr(module, "LOGITS", LOGITS)
    most, left = {}, {}
    for vocabulary in (SMALL, LARGE):
        hidden, head, targets = made(vocabulary, trained)
        most[vocabulary], left[vocabulary] = in_use(lambda h=hidden, w=head, t=targets: head_nll(h, w, t))
        if trained:  # a gradient of the layer's own size is there then
            loss = head_nll(hidden, head, targets).sum()
            back, _ = in_use(loss.backward)
            most[vocabulary] = max(most[vocabulary], back - 2 * head.weight.numel() * 4)
    whole = N * LARGE * 4
    assert most[LARGE] < 1.1 * most[SMALL] < 4.5 * LOGITS * 4 < whole
    assert max(left.values()) < N * (SMALL // 32) * 4  # a few numbers a token


def test_so_many_tokens_at_once() -> None:
    sizes = {50: 256, 49_152: 256, 65_536: 256, 128_256: 128, 151_936: 64, 262_144: 64, 10**8: 8, 0: 256}
    assert {vocabulary: tokens_at_once(vocabulary) for vocabulary in sizes} == sizes


@pytest.mark.parametrize("trained", [False, True])
def test_a_large_vocabularys_loss_and_gradients_are_torchs(monkeypatch: pytest.MonkeyPatch, trained: bool) -> None:
    monkeypatch.setattr(module, "LOGITS", LOGITS)
    hidden, head, targets = made(LARGE, trained)
    expected = torch.nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    expected.sum().backward()
    gradients = [p.grad.clone() for p in (hidden, head.weight) if p.grad is not None]
    hidden.grad = head.weight.grad = None
    found = head_nll(hidden, head, targets)
    found.sum().backward()
    torch.testing.assert_close(found, expected)
    for parameter, gradient in zip((hidden, head.weight), gradients, strict=False):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
