"""What no client would ask: requests that schemathesis makes from an OpenAPI document, valid and not."""

from __future__ import annotations

from typing import Any

KEYS = {"message", "type", "param", "code"}  # of every error


def operations(url: str) -> list[Any]:
    """The operations of the server's OpenAPI document."""
    import schemathesis

    document = schemathesis.openapi.from_url(f"{url}/openapi.json")
    return [found.ok() for found in document.get_all_operations()]


def ask_anything(
    operations: list[Any], each: int, more_keys: bool = False, headers: dict[str, str] | None = None
) -> tuple[int, list[str]]:
    """Up to `each` different requests to each operation, the same ones every time.

    Returns how many there were, and those whose answer was a server error, an error with other keys than the four (it
    may have `more_keys`), or one that shows a traceback: how to ask so again, and the answer.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    asked, failures = 0, []
    for operation in operations:
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
        if list(operation.body) or list(operation.path_parameters) or list(operation.query):
            strategy |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @settings(
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
            response = case.call(headers=headers)
            if not is_well(response, more_keys):
                failures.append(f"{case.as_curl_command()}\n{response.status_code}: {response.text}")

        check()
    return asked, failures


def is_well(response: Any, more_keys: bool) -> bool:
    """Whether the request was answered, or refused in the one shape of errors."""
    if response.status_code < 400:
        return True
    if response.status_code >= 500 or "Traceback" in response.text:
        return False
    keys = set(response.json()["error"])
    return keys >= KEYS if more_keys else keys == KEYS
