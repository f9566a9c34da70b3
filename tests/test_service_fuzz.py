"""What no client would ask of the service: schemathesis finds no server error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.service import Running, running, settings


def ask_anything(api: Running, cases: int) -> int:
    """So many requests from the OpenAPI document, valid and not; returns how many there were."""
    import schemathesis
    from hypothesis import HealthCheck, Phase, given
    from hypothesis import settings as how

    document = schemathesis.openapi.from_url(f"{api.url}/openapi.json")
    operations = [found.ok() for found in document.get_all_operations()]
    asked, each = 0, -(-cases // len(operations))
    for operation in operations:
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
        if list(operation.body) or list(operation.path_parameters) or list(operation.query):
            strategy |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @how(
            max_examples=each,
            deadline=None,
            database=None,
            derandomize=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )
        @given(case=strategy)
        def check(case: Any) -> None:
            nonlocal asked
            asked += 1
            response = case.call(headers={"Authorization": f"Bearer {api.secret}"})
            assert response.status_code < 500, (case.as_curl_command(), response.text)
            if response.status_code >= 400:
                assert set(response.json()["error"]) >= {"message", "type", "param", "code"}, response.text
                assert "Traceback" not in response.text

        check()
    return asked


@pytest.mark.parametrize("cases", [100, pytest.param(2000, marks=pytest.mark.long)])
def test_schemathesis_finds_no_server_error(cases: int, tiny_model: Path, tmp_path: Path) -> None:
    with running(settings(tmp_path, tiny_model)) as api:
        assert ask_anything(api, cases) >= cases / 4  # some operations take few different requests
