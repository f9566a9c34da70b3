"""Training as a terminal shows it, and as a log does."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tunesmith import progress
from tunesmith.train.view import curve, span, view
from tunesmith.train.watch import Finding

LINE = {"loss": 2.5, "grad_norm": 1.0, "learning_rate": 2e-4, "tokens_per_second": 512.4, "memory_bytes": 3 * 2**29}
NOTICED = Finding("spike", 2, "the loss jumped", "Look at those rows.", ["rows.jsonl:7"])


@pytest.mark.parametrize("terminal", [True, False])
def test_both_tell_the_figures_and_what_was_noticed(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(progress, "_console", Console(file=out, force_terminal=terminal, width=160))
    monkeypatch.setattr(progress, "QUIET_LINES_EVERY", 0.0)
    with view("mine", 10, 0, 60.0) as shown:
        shown.step(LINE | {"step": 1})
        shown.step(LINE | {"step": 2, "loss": 2.25, "validation_loss": 2.125})
        shown.finding(NOTICED)
    told = out.getvalue()
    assert "2.25" in told and "2.125" in told and "512" in told and "20%" in told and "left" in told
    assert "the loss jumped" in told and "rows.jsonl:7" in told
    if terminal:
        assert "1.50 GiB" in told and "2.00e-04" in told and "2.1250 at step 2" in told


def test_a_curve_and_a_time_fit_a_line() -> None:
    assert curve([3.0, 2.0, 1.0]) == "█▄▁" and curve([]) == "" and len(curve([1.0] * 1000)) <= 48
    assert (span(7), span(75), span(3725)) == ("0:07", "1:15", "1:02:05")
