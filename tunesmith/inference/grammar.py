"""JSON schemas that an answer must fulfil: checked before an engine is asked, by the library that enforces them."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

from tunesmith.errors import MachineError
from tunesmith.inference.served import GrammarError

# A model that may put spaces anywhere may put them everywhere. These are json.dumps's own.
TIGHT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def enforceable(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema as engines get it: {} stands for any object, and between values is one space or none.

    Raises:
        GrammarError: a schema that can't be enforced, and why.
        MachineError: llguidance is not installed.
    """
    asked = json.dumps(schema or {"type": "object"}, sort_keys=True)
    why = _refused(asked)
    if why:
        raise GrammarError(f"the JSON schema can't be enforced: {why}", fix="Leave out what is named, or simplify it.")
    return {**json.loads(asked), "x-guidance": TIGHT}


@lru_cache(maxsize=256)
def _refused(schema: str) -> str:
    try:
        from llguidance import LLMatcher
    except ImportError as error:
        raise MachineError("llguidance is not installed", fix="pip install 'tunesmith[serve]'") from error
    refused, messages = LLMatcher.validate_grammar_with_warnings(LLMatcher.grammar_from_json_schema(schema))
    return str(messages[0] if messages else "no reason is given").strip().splitlines()[0] if refused else ""
