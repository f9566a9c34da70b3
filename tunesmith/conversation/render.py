"""Conversation -> token ids and loss weights, through the tokenizer's own chat template; and back.

Training, evaluation and chat all render here, so that they cannot disagree. A conversation is cut where
an answer begins and ends, and each piece is tokenised on its own: the tokens before an answer are then
exactly those that the model is given when it is asked for that answer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tunesmith.conversation.message import Conversation, Message, Text
from tunesmith.errors import ModelError
from tunesmith.runs import hash_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# For tokenizers that bring no template. It needs no special token but the tokenizer's own end of sequence.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ {'system': 'System', 'user': 'User', 'assistant': 'Assistant', 'tool': 'Tool'}[message['role']] }}: "
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}Assistant: {% endif %}"
)

FOREIGN = ("user", "tool")
MARK = "\U0010fffd"  # of the private planes: in no text
MARKED = re.compile(f"({MARK}(?:[^{MARK}]{MARK})+)")


@dataclass(frozen=True)
class Rendered:
    """Token ids and, for each, the weight of its loss (0: context only). Both have length [T]."""

    ids: list[int]
    weights: list[float]

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained(self) -> int:
        """How many tokens carry loss."""
        return sum(1 for weight in self.weights if weight)


class Renderer:
    """One model's way of writing conversations as tokens.

    Args:
        tokenizer: with its chat template, or without (then `PLAIN_TEMPLATE` is used, and `template_name`
            says so).
        template: a Jinja chat template that takes the place of the tokenizer's own.
        stop_ids: further ids that end an answer, such as a generation config's.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None = None,
        stop_ids: Sequence[int] = (),
    ) -> None:
        self.tokenizer = tokenizer
        own = tokenizer.chat_template
        if isinstance(own, dict):
            own = own.get("default")
        self.template_name = "recipe" if template else "tokenizer" if own else "plain"
        self.template: str = template or own or PLAIN_TEMPLATE
        if self.template_name == "plain" and tokenizer.eos_token is None:
            raise ModelError(
                "the tokenizer has neither a chat template nor an end-of-sequence token",
                where=str(tokenizer.name_or_path),
                fix="Give a template in the recipe (model.chat_template) that ends each answer.",
            )
        ends = {tokenizer.eos_token_id, *stop_ids} - {None}
        self.stop_ids: list[int] = sorted(ends)

    @cached_property
    def hash(self) -> str:
        """Changes with anything that could change a rendering."""
        vocabulary = getattr(self.tokenizer, "backend_tokenizer", None)
        return hash_json(
            {
                "template": self.template,
                "special": {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()},
                "stop": self.stop_ids,
                "vocabulary": vocabulary.to_str() if vocabulary is not None else self.tokenizer.get_vocab(),
            }
        )

    def render(self, conversation: Conversation, only_last: bool = False) -> Rendered:
        """Token ids [T] and loss weights [T]: every assistant's turn, or the last one only.

        An answer's weight covers its text and the token that ends it. A turn whose rendering changes
        with what follows (a template that rewrites earlier turns) is left as context, and so is one that opens the
        conversation: nothing was asked, and no template is written for that.
        """
        if isinstance(conversation, Text):
            return self.render_text(conversation)
        messages, tools = conversation.messages, conversation.tools
        whole = self._text(messages, tools)
        turns = [i for i, m in enumerate(messages) if i and m.role == "assistant"]
        ids: list[int] = []
        weights: list[float] = []
        at = 0
        for i in turns:  # the untrained ones are cut out too: what is asked later is tokenised like that
            before = self._text(messages[:i], tools, ask=True)
            after = self._text(messages[: i + 1], tools)
            if not (after.startswith(before) and whole.startswith(after) and len(before) >= at):
                continue
            context = self._tokens(whole[at : len(before)])
            answer = self._tokens(after[len(before) :])
            end = self._end_of_turn(answer)
            weight = 0.0 if only_last and i != turns[-1] else messages[i].weight
            ids += context + answer
            weights += [0.0] * len(context) + [weight] * end + [0.0] * (len(answer) - end)
            at = len(after)
        if not any(weights):
            ids += self._tokens(whole[at:])
            return Rendered(ids, [0.0] * len(ids))
        while not weights[-1]:  # nothing is learnt from what follows the last answer
            ids.pop(), weights.pop()
        return Rendered(ids, weights)

    def render_text(self, row: Text) -> Rendered:
        """A plain text's token ids, begun as the tokenizer begins a text and ended by its end of sequence (once, also
        where the text was written with it); other special tokens in it are plain text. Every token but the first
        carries loss."""
        ids = list(self.text_ids(self._unended(row), specials=False))
        end = self.tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
        return Rendered(ids, [0.0] + [1.0] * (len(ids) - 1))

    def prompt(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> list[int]:
        """Token ids of a conversation that the assistant is to go on with."""
        whole = self._text(messages, tools, ask=True)
        ids: list[int] = []
        at = 0
        for i, message in enumerate(messages):
            if not i or message.role != "assistant":
                continue
            before, after = self._text(messages[:i], tools, ask=True), self._text(messages[: i + 1], tools)
            if after.startswith(before) and whole.startswith(after) and len(before) >= at:
                ids += self._tokens(whole[at : len(before)]) + self._tokens(after[len(before) :])
                at = len(after)
        return ids + self._tokens(whole[at:])

    def decode(self, ids: Sequence[int]) -> str:
        """An answer's text, up to the first token that ends it."""
        kept = []
        for token in ids:
            if token in self.stop_ids:
                break
            kept.append(token)
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text

    def text_ids(self, text: str, specials: bool = True) -> list[int]:
        """A text's token ids, as the tokenizer begins a text; special tokens in it are themselves, or plain text."""
        ids: list[int] = self.tokenizer(text, split_special_tokens=not specials)["input_ids"]
        return ids

    def answer_text(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
        """What the template writes for the last message, an assistant's, after its prompt."""
        before, after = self._text(messages[:-1], tools, ask=True), self._text(messages, tools)
        return after.removeprefix(before) if after.startswith(before) else ""

    def continued(self, text: str) -> list[int]:
        """Token ids of a text that the template itself could have written behind a prompt."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def plain(self, text: str) -> str:
        """A text without special tokens, as `decode` gives it."""
        return self._special.sub("", text)

    def check(self) -> None:
        """Raise unless an answer ends with a token that stops generation, and that token is trained.

        Raises:
            ModelError: naming the template and the tokens that would have counted.
        """
        probe = Conversation((Message("user", "Hello"), Message("assistant", "Good morning")))
        rendered = self.render(probe)
        trained = [i for i, weight in zip(rendered.ids, rendered.weights, strict=True) if weight]
        if not trained:
            raise ModelError(
                "the chat template writes a prompt differently once it is answered, so answers can't be told apart",
                where=str(self.tokenizer.name_or_path),
                fix="Give another template in the recipe: model.chat_template.",
            )
        if trained[-1] not in self.stop_ids:
            stops = ", ".join(repr(t) for t in self.tokenizer.convert_ids_to_tokens(self.stop_ids)) or "none"
            raise ModelError(
                "the chat template ends an answer without a token that stops generation, so the model would "
                f"never learn to stop (tokens that stop it: {stops})",
                where=str(self.tokenizer.name_or_path),
                fix="Write the end token into model.chat_template, or name the one it uses: model.end_of_turn.",
            )

    def _end_of_turn(self, answer: list[int]) -> int:
        """How many of an answer's tokens are trained: up to and with its end token, not what pads the turn."""
        for i in range(len(answer) - 1, -1, -1):
            if answer[i] in self.stop_ids:
                return i + 1
        return len(answer)

    @cached_property
    def writes_tools(self) -> bool:
        """Whether the template shows what tools there are, and the assistant's calls of them."""
        parameters = {"type": "object", "properties": {"zone": {"type": "string"}}}
        tool = {"type": "function", "function": {"name": "known_tool", "description": "-", "parameters": parameters}}
        call = {"type": "function", "function": {"name": "called_tool", "arguments": {"zone": "x"}}}
        messages = (Message("user", "Hi"), Message("assistant", "", more={"tool_calls": [call]}))
        try:
            text = self._text(messages, [tool])
        except ModelError:
            return False
        return "known_tool" in text and "called_tool" in text

    def specials_in(self, conversation: Conversation) -> int:
        """How many special tokens stand in what users and tools say, or in a plain text. They are read as plain text
        there."""
        if isinstance(conversation, Text):
            return len(self._special.findall(self._unended(conversation)))
        return sum(
            len(self._special.findall(m.content.replace(MARK, ""))) for m in conversation.messages if m.role in FOREIGN
        )

    def _unended(self, row: Text) -> str:
        """A plain text without the end of sequence that it may have been written with."""
        return row.text.removesuffix(self.tokenizer.eos_token or "")

    @cached_property
    def _special(self) -> re.Pattern[str]:
        """The tokens that only a template may write."""
        added = [str(t) for t in self.tokenizer.added_tokens_decoder.values() if t.special]
        tokens = sorted({*map(str, self.tokenizer.all_special_tokens), *added}, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, tokens)) or "(?!)")

    def _masked(self, message: Message) -> dict[str, Any]:
        """The message with its special tokens marked, where somebody else than the model or its owner wrote it."""
        told = message.for_template()
        said = message.content.replace(MARK, "")  # else a token could be written around it
        if message.role in FOREIGN and (said != message.content or self._special.search(said)):
            told["content"] = self._special.sub(lambda m: MARK + MARK.join(m[0]) + MARK, said)
        return told

    def _text(self, messages: Sequence[Message], tools: Sequence[dict[str, Any]] = (), ask: bool = False) -> str:
        """The template's text. A mark stands before, after and between the letters of a special token that was
        said, so that it is none."""
        if not messages and not ask:
            return ""
        if any(m.media for m in messages):
            raise ModelError(
                "a row holds images or sounds, which a model of text can't be given",
                where=" ".join(m.role for m in messages),
                fix="Take such rows' words alone (data.media: words), or leave them out (data.media: drop).",
            )
        try:
            text: Any = self.tokenizer.apply_chat_template(
                [self._masked(m) for m in messages],
                tools=list(tools) or None,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=ask,
            )
        except Exception as error:
            raise ModelError(
                f"the chat template refused a conversation ({error})",
                where=" ".join(m.role for m in messages) or str(self.tokenizer.name_or_path),
                fix="Check the order of roles that this model allows.",
            ) from error
        return str(text)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = []
        for number, piece in enumerate(MARKED.split(text)):
            if piece:  # the odd ones were marked
                marked = bool(number % 2)
                said = piece.replace(MARK, "") if marked else piece
                ids += self.tokenizer(said, add_special_tokens=False, split_special_tokens=marked)["input_ids"]
        return ids
