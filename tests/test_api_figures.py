"""What /metrics counts, by value: drafts, the response cache, the queue."""

from __future__ import annotations

import threading
import time

from starlette.testclient import TestClient

from tests.scripted import ask, figures, said, scripted, state_of, streamed
from tunesmith.api.app import build

CHAT = '{model="scripted",route="chat"}'


def test_what_a_draft_proposed_and_what_was_taken_is_counted_once() -> None:
    engine = scripted(drafted=7, accepted=4)
    with TestClient(build(state_of(engine, cache={}))) as http:
        said(ask(http, temperature=0))
        assert streamed(http, temperature=1)[1] == "stop"
        found = figures(http)
        assert found[f"tunesmith_drafted_tokens_total{CHAT}"] == 14
        assert found[f"tunesmith_accepted_tokens_total{CHAT}"] == 8
        assert ask(http, temperature=0).headers["x-tunesmith-cache"] == "hit"  # nothing was proposed for this one
        found = figures(http)
    assert found[f"tunesmith_drafted_tokens_total{CHAT}"] == 14
    assert found[f"tunesmith_accepted_tokens_total{CHAT}"] == 8


def test_hits_of_the_cache_are_counted() -> None:
    with TestClient(build(state_of(scripted(), cache={}))) as http:
        for temperature in (0, 0, 0, 1):
            said(ask(http, temperature=temperature))
        found = figures(http)
    assert found[f"tunesmith_cache_hits_total{CHAT}"] == 2
    assert found[f"tunesmith_cache_misses_total{CHAT}"] == 2


def test_who_waits_for_a_slot_is_counted() -> None:
    engine = scripted("word " * 400, slots=1, pause=0.005)
    with TestClient(build(state_of(engine))) as http:
        threads = [threading.Thread(target=ask, args=(http,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        end = time.monotonic() + 60
        while engine.waiting < 2:
            assert time.monotonic() < end, "nobody waited"
            time.sleep(0.005)
        assert figures(http)['tunesmith_waiting{engine="scripted"}'] == 2
        for thread in threads:
            thread.join()
        found = figures(http)
    assert found['tunesmith_waiting{engine="scripted"}'] == 0
    assert found[f"tunesmith_running{CHAT}"] == 0
