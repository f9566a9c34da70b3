"""What carries loss, and that a prompt is tokenised in training as when it is asked."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import make_tokenizer
from tunesmith.conversation.message import Conversation, Message
from tunesmith.conversation.render import Renderer
from tunesmith.errors import ModelError


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
