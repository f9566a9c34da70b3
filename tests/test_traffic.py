"""The traffic log: one answer's trouble is no other's, and nothing is free because it could not be written."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tunesmith.serve.section import TrafficSection
from tunesmith.serve.traffic import Traffic


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Any]:
    from tunesmith import store as stores

    opened = stores.open(f"sqlite:///{tmp_path}/traffic.db")
    yield opened
    opened.close()


def about(number: int, key: str) -> dict[str, Any]:
    same = {"endpoint": "chat", "model": "m", "project": None, "served_by": None, "user": None, "status": 200}
    counts = {"prompt_tokens": 3, "completion_tokens": 4, "seconds": 0.1, "flags": []}
    return same | counts | {"id": f"chatcmpl-{number}", "key": key}


def test_answers_with_deep_lists_are_kept_with_all_others(store: Any) -> None:
    async def work() -> None:
        async with Traffic(store, TrafficSection()) as traffic:
            for number, text in enumerate(["[" * 100_000, '{"a": ' * 50_000, "ada@example.com"]):
                traffic.add({"messages": [{"content": text}]}, {}, **about(number, "k"))

    asyncio.run(work())
    kept = list(store.traffic.export())
    assert len(kept) == 3 and kept[2].request["messages"][0]["content"] == "[EMAIL_ADDRESS]"


def test_an_answer_that_can_not_be_redacted_is_kept_without_its_text(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(text: str) -> str:
        if text == "odd":
            raise RuntimeError("odd")
        return text

    monkeypatch.setattr("tunesmith.screen.hide.hidden", fails)

    async def work() -> None:
        async with Traffic(store, TrafficSection()) as traffic:
            traffic.add({"text": "odd"}, {}, **about(0, "k"))
            traffic.add({"text": "fine"}, {}, **about(1, "k"))

    asyncio.run(work())
    assert [t.request for t in store.traffic.export()] == [None, {"text": "fine"}]


def test_tokens_count_until_they_are_charged(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key, _ = store.keys.create("test", role="runner")
    spend = store.keys.spend

    def fails(*_: Any) -> int:
        raise RuntimeError("no database")

    async def work() -> list[int]:
        found = []
        traffic = Traffic(store, TrafficSection())
        monkeypatch.setattr(store.keys, "spend", fails)
        traffic.add({}, {}, **about(0, key.id))
        await traffic._write()
        found.append(await traffic.spent(key.id))
        monkeypatch.setattr(store.keys, "spend", spend)
        traffic.add({}, {}, **about(1, key.id))
        await traffic._write()
        return [*found, await traffic.spent(key.id), store.keys.spent(key.id)]

    assert asyncio.run(work()) == [7, 14, 14]


@pytest.mark.parametrize(
    ("text", "kept"), [("none", None), ("redacted", "Ask [EMAIL_ADDRESS]"), ("full", "Ask a@b.com")]
)
def test_feedback_is_kept_as_texts_are(store: Any, text: Any, kept: str | None) -> None:
    async def work() -> None:
        async with Traffic(store, TrafficSection(text=text)) as traffic:
            traffic.add({}, {}, **about(0, "k"))
            await traffic.feedback("chatcmpl-0", rating=1.0, correction="Ask a@b.com")

    asyncio.run(work())
    found = store.feedback.of("chatcmpl-0")[0]
    assert found.rating == 1 and found.correction == kept
