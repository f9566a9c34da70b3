"""What no client would ask of the service: schemathesis finds no server error."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.anything import ask_anything, operations
from tests.service import running, settings


@pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.proof)])
def test_schemathesis_finds_no_server_error(cases: int, tiny_model: Path, tmp_path: Path) -> None:
    with running(settings(tmp_path, tiny_model)) as api:
        headers = {"Authorization": f"Bearer {api.secret}"}
        asked, failures = ask_anything(operations(api.url), cases, more_keys=True, headers=headers)
    assert failures == [] and asked >= cases
