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
    operations: list[Any], cases: int, more_keys: bool = False, headers: dict[str, str] | None = None
) -> tuple[int, list[str]]:
    """At least `cases` different requests, the same ones every time: as many to each operation, and more to the others
    where some take few.

    Returns how many there were, and those whose answer was a server error, an error with other keys than the four (it
    may have `more_keys`), or one that shows a traceback: how to ask so again, and the answer.
    """
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings

    asked, failures = 0, []
    for number, operation in enumerate(sorted(operations, key=_kinds)):
        share = -(-(cases - asked) // (len(operations) - number))
        strategy = operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE)
        if _kinds(operation):
            strategy |= operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE)

        @settings(
            max_examples=max(1, share),
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


def _kinds(operation: Any) -> int:
    """How different its requests can be: by nothing, by an address, by a body too."""
    return bool(list(operation.path_parameters) or list(operation.query)) + 2 * bool(list(operation.body))


def is_well(response: Any, more_keys: bool) -> bool:
    """Whether the request was answered, or refused in the one shape of errors."""
    if response.status_code < 400:
        return True
    if response.status_code >= 500 or "Traceback" in response.text:
        return False
    keys = set(response.json()["error"])
    return keys >= KEYS if more_keys else keys == KEYS
