"""Every type of causal language model that transformers has, as docs/decoders.json says (a long test)."""

from __future__ import annotations

import json
from importlib.metadata import version

import pytest

from tests import decoders
from tools import decoder_table

KNOWN = json.loads(decoder_table.RESULTS.read_text(encoding="utf-8"))
SAME = KNOWN["transformers"] == version("transformers")


def test_the_page_tells_what_all_types_came_to() -> None:
    page = decoder_table.PAGE.read_text(encoding="utf-8")
    assert decoder_table.written(page, KNOWN) == page, "run: python tools/decoder_table.py"
    if SAME:
        assert set(KNOWN["types"]) == set(decoders.every()), "run: python tools/decoder_table.py"


@pytest.mark.long
@pytest.mark.skipif(not SAME, reason="the types are another version's of transformers")
@pytest.mark.parametrize("kind", KNOWN["types"])
def test_rows_of_a_type_lose_what_the_model_says(kind: str) -> None:
    assert decoders.tried(kind)[0] == KNOWN["types"][kind][0]
