"""Serving engines: the same answers as transformers, many at once, adapters that come and go, and what breaks."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.serving import BIAS, CONTEXT, ENDLESS, STOPS, Served, build, prompts, serve
from tunesmith.errors import ModelError
from tunesmith.inference.engines import EngineSection, LlamaCpp, Transformers
from tunesmith.inference.served import EngineDown, EngineFull, GrammarError, Request, TooLong, UnknownAdapter, Unserved

pytest.importorskip("aiohttp")
pytest.importorskip("llguidance")
SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "sizes": {"type": "array", "items": {"type": "integer"}}},
    "required": ["colour", "sizes"],
    "additionalProperties": False,
}


def section(kind: str, **settings: Any) -> EngineSection:
    told = {"slots": 4, "context": CONTEXT, "precision": "float32", **settings}
    if kind == "llamacpp":
        pytest.importorskip("xllamacpp")
        return LlamaCpp(threads=1, **told)
    return Transformers(**told)


@pytest.fixture(scope="module", params=["llamacpp", "transformers"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    found = serve(section(request.param), tmp_path_factory.mktemp(request.param))
    yield found
    found.run(found.engine.close())
    found.runner.close()


@pytest.fixture
def loaded(served: Served) -> Iterator[Served]:
    """With both adapters."""
    for name, path in served.adapters.items():
        served.run(served.engine.load_adapter(name, path))
    yield served
    for name in served.adapters:
        served.run(served.engine.unload_adapter(name))


def test_answers_asked_at_once_are_those_of_transformers(served: Served) -> None:
    async def all_at_once() -> list[list[int]]:
        return await asyncio.gather(*(served.answer(i) for i in (0, 1, 2, 0, 1, 2)))

    assert served.run(all_at_once()) == served.expected[None] * 2
    assert served.engine.health() == "ready"


def test_text_ids_and_finish(served: Served) -> None:
    from tests.conftest import make_tokenizer

    long = served.run(served.pieces(Request(prompts()[0], 12, (), logit_bias=ENDLESS)))
    assert len(long) >= 12 and long[-1].finish == "length" and [p.finish for p in long[:-1]] == [None] * (len(long) - 1)
    ids = [i for piece in long for i in piece.ids]
    text = "".join(piece.text for piece in long)
    assert len(ids) == 12 and text == make_tokenizer().decode(ids)
    ended = served.run(served.pieces(Request(prompts()[0], 12, (ids[5], *STOPS), logit_bias=BIAS)))
    assert [i for piece in ended for i in piece.ids] == ids[: ids.index(ids[5])] and ended[-1].finish == "stop"


def test_a_whole_answer_is_what_its_pieces_are(served: Served) -> None:
    ids = served.run(served.ids(Request(prompts()[1], 12, (), logit_bias=ENDLESS)))
    for stop_ids, stop in (((), ()), ((ids[6], *STOPS), ()), (STOPS, ("e",))):
        request = Request(prompts()[1], 12, stop_ids, stop=stop, logit_bias=BIAS, top_logprobs=1)
        pieces = served.run(served.pieces(request))
        whole = served.run(served.pieces(replace(request, whole=True)))
        assert "".join(p.text for p in whole) == "".join(p.text for p in pieces)
        assert whole[-1].finish == pieces[-1].finish
        if not stop:
            assert [i for p in whole for i in p.ids] == [i for p in pieces for i in p.ids]
            assert [lp.id for p in whole for lp in p.logprobs] == [i for p in whole for i in p.ids]


def test_a_stop_text_is_not_told_nor_what_follows(served: Served) -> None:
    whole = "".join(p.text for p in served.run(served.pieces(Request(prompts()[1], 20, (), logit_bias=ENDLESS))))
    stop = whole[6:9]
    cut = served.run(served.pieces(Request(prompts()[1], 20, (), logit_bias=ENDLESS, stop=("never said", stop))))
    assert "".join(p.text for p in cut) == whole[: whole.index(stop)] and cut[-1].finish == "stop"


def test_log_probabilities_are_the_models(served: Served) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    request = Request(prompts()[0], 6, (), top_logprobs=3, logit_bias=ENDLESS)
    told = [one for piece in served.run(served.pieces(request)) for one in piece.logprobs]
    ids = [one.id for one in told]
    assert len(ids) == 6
    model = AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.float32)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompts()[0] + ids])).logits[0]
    likely = logits[len(prompts()[0]) - 1 : -1].log_softmax(-1)
    for place, one in enumerate(told):
        assert one.logprob == pytest.approx(likely[place, one.id].item(), abs=1e-3)
        values, best = likely[place].topk(3)
        assert [top.id for top in one.top] == best.tolist()
        assert [top.logprob for top in one.top] == pytest.approx(values.tolist(), abs=1e-3)
    text = "".join(piece.text for piece in served.run(served.pieces(request)))
    assert b"".join(one.data for one in told).decode() == text


def test_an_echo_has_the_prompts_log_probabilities_where_the_engine_tells_them(loaded: Served) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    prompt = prompts()[0]
    usual = Request(prompt, 4, STOPS, adapter="first", logit_bias=BIAS, top_logprobs=2)
    asked = replace(usual, echo=True)
    if loaded.engine.kind == "llamacpp":
        with pytest.raises(Unserved, match="llamacpp tells no log-probabilities of a prompt"):
            loaded.run(loaded.pieces(asked))
        assert loaded.run(loaded.ids(usual))
        return
    first, *rest = loaded.run(loaded.pieces(asked))
    assert [i for piece in rest for i in piece.ids] == loaded.run(loaded.ids(usual)) and first.text == ""
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(loaded.model), loaded.adapters["first"])
    with torch.no_grad():
        expected = tuned(input_ids=torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [token.id for token in first.prompt] == prompt and first.prompt[0].logprob != first.prompt[0].logprob
    values = [expected[place, token].item() for place, token in enumerate(prompt[1:])]
    assert [token.logprob for token in first.prompt[1:]] == pytest.approx(values, abs=1e-4)
    only = loaded.run(loaded.pieces(replace(asked, max_new_tokens=0)))
    assert only[0].prompt[1:] == first.prompt[1:] and only[-1].finish == "length" and not only[-1].ids


def test_seeds_temperature_and_top_p(served: Served) -> None:
    def drawn(**settings: Any) -> list[int]:
        return served.run(served.ids(Request(prompts()[0], 16, (), logit_bias=ENDLESS, **settings)))  # type: ignore[no-any-return]

    assert drawn(temperature=1.5, seed=1) == drawn(temperature=1.5, seed=1) != drawn(temperature=1.5, seed=2)
    assert drawn(temperature=1.5, top_p=1e-6, seed=1) == drawn()


def test_bias_and_penalties_move_answers(served: Served) -> None:
    plain = served.run(served.ids(Request(prompts()[0], 16, (), logit_bias=ENDLESS)))
    without = served.run(served.ids(Request(prompts()[0], 16, (), logit_bias=ENDLESS | {plain[0]: -1000.0})))
    assert plain[0] not in without
    always = served.run(served.ids(Request(prompts()[0], 3, (), logit_bias={plain[0]: 1000.0})))
    assert always == [plain[0]] * 3
    once = served.run(
        served.ids(Request(prompts()[0], 16, (), logit_bias=ENDLESS, presence_penalty=2.0, frequency_penalty=50.0))
    )
    assert len(set(once)) == len(once) == 16


def test_answers_under_a_schema_always_fulfil_it(served: Served) -> None:
    import jsonschema

    async def answers() -> list[str]:
        asked = [
            Request(prompts()[i % 3], 120, STOPS, temperature=1.0, seed=i, grammar=SCHEMA, logit_bias={17: i % 2})
            for i in range(8)
        ]
        told = await asyncio.gather(*map(served.pieces, asked))
        return ["".join(p.text for p in pieces) for pieces in told if pieces[-1].finish == "stop"]

    found = served.run(answers())
    assert len(found) >= 4
    for text in found:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_any_object_and_a_schema_that_can_not_be(served: Served) -> None:
    text = "".join(p.text for p in served.run(served.pieces(Request(prompts()[0], 60, STOPS, grammar={}))))
    assert text.startswith("{")
    with pytest.raises(GrammarError, match="can't be enforced"):
        served.run(served.pieces(Request(prompts()[0], 60, STOPS, grammar={"type": "colour"})))


def test_adapters_share_a_batch_and_each_answers_as_peft_does(loaded: Served) -> None:
    names = [None, "first", "second"]

    async def all_at_once() -> list[list[int]]:
        return await asyncio.gather(*(loaded.answer(i, name) for name in names for i in range(3)))

    found = loaded.run(all_at_once())
    assert found == [answer for name in names for answer in loaded.expected[name]]
    assert loaded.engine.adapters() == ["first", "second"]


def test_a_prompts_beginning_is_read_once_and_never_anothers(loaded: Served) -> None:
    prompt = prompts()[1]

    def cached(adapter: str | None) -> int:
        request = Request(prompt, 2, STOPS, adapter=adapter, logit_bias=BIAS)
        return int(loaded.run(loaded.pieces(request))[-1].cached)

    for adapter in (None, "first", "second"):
        cached(adapter)
        assert cached(adapter) >= len(prompt) - 2
        assert loaded.run(loaded.answer(1, adapter)) == loaded.expected[adapter][1]


def test_adapters_come_and_go_while_others_are_answered(served: Served) -> None:
    async def through() -> None:
        request = Request(prompts()[0], 200, (), logit_bias=ENDLESS)
        alone = await served.ids(request)
        streams = [asyncio.create_task(served.ids(request)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await served.engine.load_adapter("first", served.adapters["first"])
        assert await served.answer(0, "first") == served.expected["first"][0]
        late = asyncio.create_task(served.ids(Request(prompts()[0], 150, (), adapter="first", logit_bias=ENDLESS)))
        await asyncio.sleep(0.05)
        await served.engine.unload_adapter("first")
        with pytest.raises(UnknownAdapter, match="first"):
            await served.answer(0, "first")
        assert len(await late) == 150  # what had begun ends with its adapter
        assert await asyncio.gather(*streams) == [alone] * 3

    served.run(through())


def test_what_is_no_adapter_of_this_model_changes_nothing(served: Served, tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        served.run(served.engine.load_adapter("none", tmp_path))
    from tests.conftest import make_model
    from tests.serving import make_adapter

    other = make_model(tmp_path / "other", hidden_size=64)
    make_adapter(other, tmp_path / "wide", 0)
    with pytest.raises(ModelError):
        served.run(served.engine.load_adapter("wide", tmp_path / "wide"))
    assert served.engine.adapters() == [] and served.run(served.answer(0)) == served.expected[None][0]


def test_a_cancelled_stream_frees_its_place_at_once(served: Served) -> None:
    async def through() -> None:
        request = Request(prompts()[0], 200, (), logit_bias=ENDLESS)
        streams = [served.engine.stream(request) for _ in range(4)]
        for stream in streams:
            assert (await anext(stream)).finish is None
        waiting = asyncio.create_task(served.answer(0))
        await asyncio.sleep(0.1)
        for stream in streams:
            await stream.aclose()
        assert await asyncio.wait_for(waiting, 30) == served.expected[None][0]

    served.run(through())


def test_embeddings_are_means_of_length_one(served: Served) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    found = torch.tensor(served.run(served.engine.embed(prompts())))
    model = AutoModelForCausalLM.from_pretrained(served.model, dtype=torch.float32)
    with torch.no_grad():
        means = [model.model(input_ids=torch.tensor([p])).last_hidden_state[0].mean(0) for p in prompts()]
    expected = torch.stack([mean / mean.norm() for mean in means])
    assert torch.allclose(found, expected, atol=2e-3)


def test_too_long_and_unknown(served: Served) -> None:
    with pytest.raises(TooLong, match="maximum context length is 256 tokens"):
        served.run(served.ids(Request([5] * CONTEXT, 1)))
    with pytest.raises(UnknownAdapter, match="no adapter is called 'frist'"):
        served.run(served.ids(Request([5], 1, adapter="frist")))
    almost = served.run(served.pieces(Request([5] * (CONTEXT - 3), 50, logit_bias=ENDLESS)))
    assert almost[-1].finish == "length" and sum(len(p.ids) for p in almost) <= 3


def test_beyond_the_queue_requests_are_refused(tmp_path: Path) -> None:
    found = serve(section("llamacpp", slots=1, queue=2), tmp_path)

    async def through() -> None:
        request = Request(prompts()[0], 60, (), logit_bias=ENDLESS)
        told = await asyncio.gather(*(found.ids(request) for _ in range(5)), return_exceptions=True)
        refused = [one for one in told if isinstance(one, EngineFull)]
        assert len(refused) == 2 and refused[0].retry_after >= 1
        assert sum(isinstance(one, list) for one in told) == 3
        await found.engine.close()

    found.run(through())


def test_a_killed_process_is_started_again(served: Served) -> None:
    async def through() -> None:
        await served.engine.load_adapter("first", served.adapters["first"])
        stream = served.engine.stream(Request(prompts()[0], 230, (), logit_bias=ENDLESS))
        await anext(stream)
        os.kill(served.engine._child.process.pid, signal.SIGKILL)
        with pytest.raises(EngineDown) as caught:
            async for _ in stream:
                pass
        assert caught.value.retry_after >= 1
        found = None
        while found is None:
            with contextlib.suppress(EngineDown):
                found = await served.answer(0)
            await asyncio.sleep(0.05)
        assert found == served.expected[None][0] and served.engine.health() == "ready"
        assert await served.answer(1, "first") == served.expected["first"][1]  # adapters came back too
        await served.engine.unload_adapter("first")

    served.run(through())


def test_two_hundred_requests_of_which_a_third_are_cancelled(served: Served) -> None:
    """Nothing is left of them: places, files, threads, memory."""
    process = psutil.Process()

    async def one(number: int) -> Any:
        request = Request(prompts()[number % 3], 20, STOPS, logit_bias=BIAS)
        if number % 3:
            return await served.ids(request)
        stream = served.engine.stream(request)
        with contextlib.suppress(EngineFull):
            if number % 2:
                await anext(stream)
        await stream.aclose()
        return None

    async def batch(count: int) -> list[Any]:
        told = []
        for start in range(0, count, 50):
            told += await asyncio.gather(*(one(i) for i in range(start, start + 50)))
        return told

    served.run(batch(50))
    child = psutil.Process(served.engine._child.process.pid)
    before = (process.num_fds(), child.num_fds(), child.memory_info().rss)
    told = served.run(batch(200))
    served.run(asyncio.sleep(1.2))
    assert [answer for answer in told if answer is not None] == [
        served.expected[None][i % 3][:20] for start in range(0, 200, 50) for i in range(start, start + 50) if i % 3
    ]
    assert served.engine.waiting == 0 and served.engine._free._value == 4
    assert process.num_fds() <= before[0] + 2 and child.num_fds() <= before[1] + 2
    assert child.memory_info().rss <= before[2] * 1.1 + 20e6


def test_a_draft_model_changes_the_time_and_no_answer(served: Served, tmp_path: Path) -> None:
    if served.engine.kind != "llamacpp":
        pytest.skip("llama.cpp's")
    engine = build(section("llamacpp", draft=str(served.model), draft_tokens=4), served.model)
    found = Served(served.runner, engine, served.model, {}, served.expected)

    async def through() -> None:
        await engine.start()
        pieces = await found.pieces(Request(prompts()[1], 24, STOPS, logit_bias=BIAS))
        assert [i for p in pieces for i in p.ids] == served.expected[None][1]
        assert 0 < pieces[-1].accepted <= pieces[-1].drafted
        await engine.close()

    found.run(through())
