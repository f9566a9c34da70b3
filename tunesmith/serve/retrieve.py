"""Passages for a question: from a folder of documents by BM25, or from an HTTP endpoint."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from tunesmith.conversation.message import Message
from tunesmith.errors import DataError, MachineError
from tunesmith.serve.asked import Passage, Refused
from tunesmith.serve.section import RetrieveSection

SUFFIXES = (".txt", ".md", ".markdown", ".rst")
CITED = re.compile(r"\[(\d{1,2})\]")


class Retriever(Protocol):
    """Finds passages."""

    async def find(self, question: str) -> list[Passage]:
        """The best passages, best first."""


def retriever(section: RetrieveSection) -> Retriever:
    return Folder(section) if section.folder else Endpoint(section)


def shown(messages: Sequence[Message], passages: Sequence[Passage], instruction: str) -> tuple[Message, ...]:
    """The messages with numbered passages in their system message."""
    told = [f"[{i}] {f'{p.title}: ' if p.title else ''}{p.text}" for i, p in enumerate(passages, 1)]
    text = "\n\n".join([instruction, *told])
    if messages and messages[0].role == "system":
        return (replace(messages[0], content=f"{messages[0].content}\n\n{text}"), *messages[1:])
    return (Message("system", text), *messages)


def cited(answer: str, passages: Sequence[Passage]) -> list[tuple[int, int, Passage]]:
    """Where an answer cites passages by their number: start, end and the passage."""
    found = []
    for m in CITED.finditer(answer):
        if 1 <= int(m[1]) <= len(passages):
            found.append((m.start(), m.end(), passages[int(m[1]) - 1]))
    return found


class Folder:
    """A local folder of text files, cut into passages at blank lines, read once."""

    def __init__(self, section: RetrieveSection) -> None:
        assert section.folder is not None
        self._top = section.top
        folder = Path(section.folder)
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
        if not files:
            raise DataError(
                "holds no documents", where=f"serve.retrieve.folder: {folder}", fix=f"Put {', '.join(SUFFIXES)} there."
            )
        self.passages = [p for file in files for p in _passages(file, folder, section.words)]
        self._index = _indexed([f"{p.title}\n{p.text}" for p in self.passages])

    async def find(self, question: str) -> list[Passage]:
        return await asyncio.to_thread(self._best, question)

    def _best(self, question: str) -> list[Passage]:
        import bm25s

        tokens = bm25s.tokenize([question], show_progress=False, return_ids=False)
        if not tokens[0]:
            return []
        places, scores = self._index.retrieve(tokens, k=min(self._top, len(self.passages)), show_progress=False)
        best = zip(places[0].tolist(), scores[0].tolist(), strict=True)
        return [replace(self.passages[i], score=round(score, 3)) for i, score in best if score > 0]


def _indexed(texts: list[str]) -> Any:
    try:
        import bm25s
    except ImportError as error:
        raise MachineError(
            f"needs {error.name}, which is not installed", where="serve.retrieve", fix="pip install 'tunesmith[serve]'"
        ) from error
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, show_progress=False, return_ids=False), show_progress=False)
    return index


def _passages(file: Path, folder: Path, words: int) -> list[Passage]:
    """Paragraphs put together up to so many words; a longer paragraph is one passage."""
    text = file.read_text(encoding="utf-8", errors="replace")
    heading = re.search(r"^#+ (.+)$", text, re.MULTILINE)
    title, source = heading[1].strip() if heading else file.stem, str(file.relative_to(folder))
    found: list[Passage] = []
    held: list[str] = []
    for paragraph in [*re.split(r"\n\s*\n", text), None]:
        if held and (paragraph is None or sum(len(h.split()) for h in held) + len(paragraph.split()) > words):
            found.append(Passage("\n\n".join(held), source, title))
            held = []
        if paragraph and paragraph.strip():
            held.append(paragraph.strip())
    return found


class Endpoint:
    """A search of one's own behind HTTP: POST {"query", "top"} is answered by {"passages": [{"text", "source"?,
    "title"?, "score"?}]}."""

    def __init__(self, section: RetrieveSection) -> None:
        import httpx2

        assert section.url is not None
        self._url, self._top = section.url, section.top
        self._client = httpx2.AsyncClient(timeout=section.timeout)

    async def find(self, question: str) -> list[Passage]:
        import httpx2

        try:
            response = await self._client.post(self._url, json={"query": question, "top": self._top})
            response.raise_for_status()
            found = response.json()["passages"]
            return [
                Passage(str(p["text"]), str(p.get("source", "")), str(p.get("title", "")), float(p.get("score") or 0.0))
                for p in found[: self._top]
            ]
        except (httpx2.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise Refused(
                f"The search behind this model does not answer ({type(error).__name__}).",
                status=503,
                code="retrieval_failed",
                retry_after=2,
            ) from error
