"""Talking with a run's model in the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from tunesmith.progress import say

if TYPE_CHECKING:
    from tunesmith.pipeline import Result


def once(result: Result, text: str, base: bool, limit: int, engine: str = "transformers") -> dict[str, str]:
    """One message, one answer: the tuned model's, and the base's where that is asked for."""
    answers = {"prompt": text, "tuned": result.chat(text, max_new_tokens=limit, engine=engine)}
    return answers | ({"base": result.chat(text, base=True, max_new_tokens=limit, engine=engine)} if base else {})


def talk(result: Result, base: bool, limit: int, engine: str = "transformers") -> None:
    """Read lines until an empty one or end of file, and answer each as it is generated."""
    out = Console()

    def write(piece: str) -> None:
        out.print(piece, end="", markup=False, highlight=False)

    say("Loading the model")
    sides = {"tuned": False, "base": True} if base else {"tuned": False}
    chatters = {side: result.chatter(is_base, engine) for side, is_base in sides.items()}
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
