"""What carries loss, and that a prompt is tokenised in training as when it is asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import make_tokenizer, write_jsonl, write_recipe
from tunesmith.conversation.message import Conversation, Message
from tunesmith.conversation.render import Renderer
from tunesmith.errors import ModelError
from tunesmith.runs import read_jsonl


def talk(*turns: str) -> Conversation:
    return Conversation(tuple(Message(("user", "assistant")[i % 2], t) for i, t in enumerate(turns)))


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(make_tokenizer())


def carried(renderer: Renderer, conversation: Conversation, **options: Any) -> str:
    rendered = renderer.render(conversation, **options)
    ids = [i for i, w in zip(rendered.ids, rendered.weights, strict=True) if w]
    return str(renderer.tokenizer.decode(ids))


def test_every_answer_and_its_end_carry_loss(renderer: Renderer) -> None:
    row = talk("Hi", "Hello", "Bye", "See you")
    assert carried(renderer, row) == "Hello<|im_end|>See you<|im_end|>"
    assert carried(renderer, row, only_last=True) == "See you<|im_end|>"


def test_weights_of_messages(renderer: Renderer) -> None:
    row = Conversation(
        (
            Message("user", "Hi"),
            Message("assistant", "No", 0.0),
            Message("user", "So?"),
            Message("assistant", "Yes", 0.5),
        )
    )
    rendered = renderer.render(row)
    assert carried(renderer, row) == "Yes<|im_end|>"
    assert set(rendered.weights) == {0.0, 0.5}


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=20), min_size=2, max_size=6).filter(lambda t: len(t) % 2 == 0))
def test_training_sees_the_very_tokens_that_asking_gives(texts: list[str]) -> None:
    renderer = Renderer(make_tokenizer())
    row = talk(*texts)
    rendered = renderer.render(row, only_last=True)
    prompt = renderer.prompt(row.prompt)
    assert rendered.ids[: len(prompt)] == prompt
    assert not any(rendered.weights[: len(prompt)])
    whole = renderer.tokenizer.apply_chat_template([m.for_template() for m in row.messages], tokenize=False)
    assert renderer.tokenizer.decode(rendered.ids) == whole.removesuffix("\n")


def test_a_template_that_rewrites_earlier_turns_only_trains_what_it_leaves(renderer: Renderer) -> None:
    """Such as templates that strip thinking from all but the last answer."""
    rewriting = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] if loop.last or m['role'] != 'assistant' else m['content'].split('</think>')[-1] }}"
        "<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    thinking = Renderer(make_tokenizer(), rewriting)
    row = talk("Q", "<think>a</think>A", "R", "<think>b</think>B")
    assert carried(thinking, row) == "<think>b</think>B<|im_end|>"


CALLS = (
    "{% for t in tools or [] %}<|im_start|>system\n{{ t | tojson }}<|im_end|>\n{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ZONE = {"type": "function", "function": {"name": "zone", "parameters": {}}}
CALL = {"type": "function", "function": {"name": "zone", "arguments": {"city": "Oslo"}}}
CALLED = '<call>{"name": "zone", "arguments": {"city": "Oslo"}}</call><|im_end|>'


def called() -> Conversation:
    """A question, a call of a tool, the tool's answer, the answer."""
    turns = (
        Message("user", "Zone of Oslo?"),
        Message("assistant", "", more={"tool_calls": [CALL]}),
        Message("tool", "It is CET", more={"tool_call_id": "1"}),
        Message("assistant", "CET."),
    )
    return Conversation(turns, tools=(ZONE,))


def test_calls_of_tools_carry_loss_and_what_tools_answer_does_not() -> None:
    calling, row = Renderer(make_tokenizer(), CALLS), called()
    assert carried(calling, row) == CALLED + "CET.<|im_end|>"
    assert carried(calling, row, only_last=True) == "CET.<|im_end|>"
    ids = calling.render(row).ids
    for asked in (row.messages[:1], row.messages[:3]):
        prompt = calling.prompt(asked, row.tools)
        assert ids[: len(prompt)] == prompt
    assert "It is CET" in calling.tokenizer.decode(ids)


# As Qwen3 writes thinking: of the turns since the user last spoke alone. The prompt of an answer may open it, or close
# it, where the model shall not think.
THINKS = (
    "{% set last = namespace(user=-1) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > last.user %}"
    "<think>\n{{ m.reasoning_content | default('') }}\n</think>\n\n{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\nOPENING{% endif %}"
)
OPENINGS = {"the model opens": "", "the prompt opens": "<think>\\n", "the prompt closes": "<think>\\n\\n</think>\\n\\n"}


def thinking(opening: str) -> Renderer:
    return Renderer(make_tokenizer(), THINKS.replace("OPENING", "{{ '" + OPENINGS[opening] + "' }}"))


def thought(content: str, why: str, **more: Any) -> Message:
    return Message("assistant", content, more={"reasoning_content": why} | more)


@pytest.mark.parametrize("opening", OPENINGS)
def test_thinking_is_learnt_where_it_is_asked_for_and_stripped_where_it_is(opening: str) -> None:
    """What carries loss is what the model would have to say behind the prompt that it is given."""
    renderer = thinking(opening)
    renderer.check()
    row = Conversation(
        (Message("user", "Q"), thought("A", "first"), Message("user", "R"), thought("B", "second")), tools=()
    )
    prompt = renderer.prompt(row.prompt)
    assert "first" not in renderer.tokenizer.decode(prompt)
    if opening == "the prompt closes":  # such a prompt can't be gone on with by thinking
        assert carried(renderer, row) == ""
        plain = Conversation((*row.messages[:3], Message("assistant", "B")))
        assert carried(renderer, plain) == "B<|im_end|>"
        assert renderer.render(plain).ids[: len(prompt)] == prompt
        return
    begun = "<think>\n" if opening == "the model opens" else ""
    assert carried(renderer, row) == begun + "second\n</think>\n\nB<|im_end|>"
    rendered = renderer.render(row)
    assert rendered.ids[: len(prompt)] == prompt and not any(rendered.weights[: len(prompt)])


def test_thinking_between_calls_of_tools_is_kept_and_learnt() -> None:
    """Since the user last spoke nothing is stripped: each turn is learnt behind the prompt that asks for it."""
    renderer, row = thinking("the model opens"), called()
    asked, _, told, _ = row.messages
    row = Conversation((asked, thought("", "look", tool_calls=[CALL]), told, thought("CET.", "so")), tools=(ZONE,))
    look, so = "<think>\nlook\n</think>\n\n", "<think>\nso\n</think>\n\n"
    assert carried(renderer, row) == look + CALLED + so + "CET.<|im_end|>"
    ids = renderer.render(row).ids
    for messages in (row.messages[:1], row.messages[:3]):
        prompt = renderer.prompt(messages, row.tools)
        assert ids[: len(prompt)] == prompt


def test_a_row_of_which_the_template_leaves_no_turn_is_left_out_and_told(
    tunesmith: Any, recipe: dict[str, Any], tmp_path: Path
) -> None:
    thinks = THINKS.replace("OPENING", "{{ '" + OPENINGS["the prompt closes"] + "' }}")
    rows = [
        {"messages": [{"role": "user", "content": f"Q{i}"}, {"role": "assistant", "content": "A"}]} for i in range(30)
    ]
    rows[4]["messages"][1]["reasoning_content"] = "for this"
    write_jsonl(tmp_path / "rows.jsonl", rows)
    recipe["model"] = {"name": recipe["model"], "chat_template": thinks}
    path = write_recipe(tmp_path, recipe)
    said = tunesmith("data", "prepare", path)
    assert said.code == 2 and "rows.jsonl:5" in said.err and "no token of it carries loss" in said.err
    recipe["data"]["max_rejected"] = 0.1
    assert tunesmith("data", "prepare", write_recipe(tmp_path, recipe)).code == 0
    (left_out,) = read_jsonl(tmp_path / "runs/tiny/data/rejected.jsonl")
    assert left_out["reason"] == "no_loss" and left_out["row"] == "rows.jsonl:5"


def test_no_template_falls_back_to_the_plain_one_and_ends_answers() -> None:
    plain = Renderer(make_tokenizer(None))
    plain.check()
    assert plain.template_name == "plain"
    assert carried(plain, talk("Hi", "Hello")) == "Hello<|im_end|>"


def test_a_template_whose_answers_never_end_is_refused() -> None:
    endless = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    with pytest.raises(ModelError, match="never learn to stop"):
        Renderer(make_tokenizer(), endless).check()


def test_the_hash_tells_templates_and_vocabularies_apart(renderer: Renderer) -> None:
    assert renderer.hash == Renderer(make_tokenizer()).hash
    assert renderer.hash != Renderer(make_tokenizer(), "{{ messages }}").hash
    assert renderer.hash != Renderer(make_tokenizer(), stop_ids=[5]).hash
