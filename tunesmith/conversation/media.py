"""Images and sounds within messages.

A message's text holds OBJECT where each of them stands, so that whatever works on texts works on such messages too. On
disk the content is a list of parts in order, as OpenAI and transformers have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

OBJECT = "\ufffc"  # Unicode's own character for an object that stands within a text


@dataclass(frozen=True)
class Media:
    """An image or a sound.

    Attributes:
        kind: image, audio or video.
        source: a path relative to its source's folder, a URL, or a data: URI; nothing while it is not known yet.
        digest: of its bytes, the first 16 digits of SHA-256; nothing for what lies elsewhere.
    """

    kind: str
    source: str = ""
    digest: str = ""

    @property
    def told(self) -> str:
        """What makes it the same as another."""
        return f"[{self.kind} {self.digest or self.source}]"


Piece = str | Media


def pieces(text: str, media: Sequence[Media]) -> list[Piece]:
    """A message's texts and media in order: as many texts as media and one more, some of them empty."""
    first, *others = text.split(OBJECT)
    found: list[Piece] = [first]
    for one, after in zip(media, others, strict=True):
        found += [one, after]
    return found


def together(found: Iterable[Piece]) -> tuple[str, tuple[Media, ...]]:
    """A message's text and media, of its pieces in order.

    Raises:
        ValueError: a text holds OBJECT itself.
    """
    text, media = "", []
    for piece in found:
        if isinstance(piece, Media):
            text += OBJECT
            media.append(piece)
        elif OBJECT in piece:
            raise ValueError("its text holds U+FFFC, which stands for an image or a sound")
        else:
            text += piece
    return text, tuple(media)


def as_parts(text: str, media: Sequence[Media]) -> list[dict[str, Any]]:
    """A content as a list of parts."""
    parts: list[dict[str, Any]] = []
    for piece in pieces(text, media):
        if isinstance(piece, Media):
            part = {"type": piece.kind, piece.kind: piece.source}
            parts.append(part | ({"sha256": piece.digest} if piece.digest else {}))
        elif piece:
            parts.append({"type": "text", "text": piece})
    return parts


def from_parts(parts: Sequence[dict[str, Any]]) -> tuple[str, tuple[Media, ...]]:
    """A content that `as_parts` gave."""
    return together(
        part["text"] if part["type"] == "text" else Media(part["type"], part[part["type"]], part.get("sha256", ""))
        for part in parts
    )
