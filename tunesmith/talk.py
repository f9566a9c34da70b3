"""Talking with a run's model in the terminal."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from tunesmith.errors import ModelError
from tunesmith.progress import say

if TYPE_CHECKING:
    from tunesmith.pipeline import Result


class Talker(Protocol):
    """What answers: `history` holds what was said, and both sides are added to it."""

    model: str

    def reply(self, text: str, history: list[Any], on_text: Callable[[str], None], max_new_tokens: int) -> str: ...


class Far:
    """A model behind a server's OpenAI API.

    Args:
        model: its name there; the first that the server lists, if None.

    Raises:
        ModelError: the server does not answer, or refuses.
    """

    def __init__(self, url: str, model: str | None, key: str) -> None:
        import httpx2

        address = url.rstrip("/").removesuffix("/v1")
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self._url, self._client = f"{address}/v1", httpx2.Client(timeout=600, headers=headers)
        listed = self._listed()
        self.model = model or str(listed[0]["id"])
        # Half of the context is left for what was said.
        told = next((m for m in listed if m["id"] == self.model), {})
        self._longest = told["max_model_len"] // 2 if "max_model_len" in told else None

    def reply(self, text: str, history: list[Any], on_text: Callable[[str], None], max_new_tokens: int) -> str:
        import httpx2

        history.append({"role": "user", "content": text})
        body = {
            "model": self.model,
            "messages": history,
            "max_tokens": min(max_new_tokens, self._longest or max_new_tokens),
            "temperature": 0,
            "stream": True,
        }
        said = []
        try:
            with self._client.stream("POST", f"{self._url}/chat/completions", json=body) as response:
                if response.status_code != 200:
                    response.read()
                    raise self._refused(response)
                for line in response.iter_lines():
                    if not line.startswith("data: ") or line == "data: [DONE]":
                        continue
                    event = json.loads(line[6:])
                    if "error" in event:
                        raise ModelError(event["error"]["message"], where=self._url)
                    for choice in event["choices"]:
                        said.append(choice["delta"].get("content") or "")
                        on_text(said[-1])
        except httpx2.HTTPError as error:
            raise self._silent(error) from error
        history.append({"role": "assistant", "content": "".join(said)})
        return "".join(said)

    def _listed(self) -> list[dict[str, Any]]:
        import httpx2

        try:
            response = self._client.get(f"{self._url}/models")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise self._silent(error) from error
        if response.status_code != 200:
            raise self._refused(response)
        found: list[dict[str, Any]] = response.json()["data"]
        return found

    def _refused(self, response: Any) -> ModelError:
        try:
            why = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            why = f"status {response.status_code}"
        return ModelError(why, where=self._url, fix="Check the address, the model's name and --key.")

    def _silent(self, error: Exception) -> ModelError:
        return ModelError(
            f"the server does not answer ({error})", where=self._url, fix="Check the address, and that it runs."
        )


def once(result: Result, text: str, base: bool, limit: int, engine: str = "transformers") -> dict[str, str]:
    """One message, one answer: the tuned model's, and the base's where that is asked for."""
    answers = {"prompt": text, "tuned": result.chat(text, max_new_tokens=limit, engine=engine)}
    return answers | ({"base": result.chat(text, base=True, max_new_tokens=limit, engine=engine)} if base else {})


def once_with(chatter: Talker, text: str, limit: int) -> dict[str, str]:
    """One message, one answer of a server."""
    return {"prompt": text, "model": chatter.model, "answer": chatter.reply(text, [], lambda _: None, limit)}


def talk(result: Result, base: bool, limit: int, engine: str = "transformers") -> None:
    """Talk with a run's model."""
    say("Loading the model")
    sides = {"tuned": False, "base": True} if base else {"tuned": False}
    talk_with({side: result.chatter(is_base, engine) for side, is_base in sides.items()}, limit)


def talk_with(chatters: Mapping[str, Any], limit: int) -> None:
    """Read lines until an empty one or end of file, and answer each as it is generated."""
    out = Console(emoji=False)

    def write(piece: str) -> None:
        out.print(piece, end="", markup=False, highlight=False)

    histories: dict[str, list[Any]] = {side: [] for side in chatters}
    out.print("An empty line ends the talk; /new forgets what was said.", style="dim")
    while True:
        try:
            text = out.input("[bold]you[/bold]> ").strip()
        except EOFError:
            return
        if not text:
            return
        if text == "/new":
            histories = {side: [] for side in chatters}
            continue
        if text.startswith("/"):
            out.print("There is only /new; an empty line ends the talk.", style="dim")
            continue
        for side, chatter in chatters.items():
            out.print(f"[bold]{side}[/bold]> ", end="")
            chatter.reply(text, histories[side], write, limit)
            out.print()
