"""Asking an OpenAI-compatible endpoint for rows, every reply kept: what was paid for once is not asked for again."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tunesmith.conversation.message import Message
from tunesmith.data.augment.base import Account
from tunesmith.errors import DataError
from tunesmith.inference.endpoint import Endpoint, about_tokens
from tunesmith.inference.engine import Sampling, Tick
from tunesmith.inference.kept import Kept
from tunesmith.inference.subject import Ask, Reply
from tunesmith.models.resolve import cache_folder
from tunesmith.progress import bar
from tunesmith.runs import hash_json


class Whole(Endpoint):
    """An endpoint whose first failure ends the asking: half of the rows are not what the recipe asks for."""

    def answers(
        self, prompts: Sequence[Ask], limit: int, sampling: Sampling | None, tick: Tick
    ) -> Iterator[tuple[int, Reply]]:
        for i, reply in super().answers(prompts, limit, sampling, tick):
            if reply.failure:
                raise DataError(
                    f"the endpoint gave no answer: {reply.failure}",
                    where=self.name,
                    fix="Check the model's name, and run again: what came so far is kept.",
                )
            yield i, reply


def ask(
    name: str, prompts: Sequence[Sequence[Message]], limit: int, drawn: tuple[float, int], account: Account
) -> list[str]:
    """The answers of an endpoint, `URL#MODEL`, in the prompts' order; drawn at a temperature, with a seed.

    Replies lie in the cache by what was asked, as they come; so a run that was stopped goes on where it was.

    Raises:
        DataError: the endpoint fails on every try. ModelError: it lets nobody in.
    """
    endpoint = Whole(name)
    kept = cache_folder() / "augment" / f"{hash_json(endpoint.name)[:16]}.jsonl"
    asked = [Ask(tuple(prompt)) for prompt in prompts]
    with bar("Asking for rows", len(asked)) as progress:
        subject = Kept(kept, endpoint.model, lambda: endpoint, about_tokens, scores=False)
        replies = subject.replies(asked, limit, progress.advance, Sampling(*drawn))
    tokens = {"prompt": sum(r.read for r in replies), "completion": sum(r.tokens for r in replies)}
    account.tokens.update(tokens, kept=sum(tokens.values()) - sum(endpoint.usage.values()))
    return [reply.text for reply in replies]
