"""Images and sounds of rows: as people write them -> parts of messages, looked at on disk.

They come as parts of a message (OpenAI's `image_url` and `input_audio`, transformers' `image` and `audio`), or in a
column beside the messages, with a mark for each in a text (LLaMA-Factory's `<image>`), an empty part (TRL's
`{type: image}`), or nothing at all: then they stand before the first question. A file is only looked at, never decoded.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.conversation.media import Media, Piece, pieces, together
from tunesmith.conversation.message import Conversation, Message, Text
from tunesmith.data.section import SourceSection
from tunesmith.data.unusable import Unusable
from tunesmith.data.values import Bytes, is_text

KINDS = ("image", "audio", "video")
COLUMNS = {name: kind for kind in KINDS for name in (kind, f"{kind}s")}
ELSEWHERE = ("http", "https", "s3", "gs", "hf")
PARTS = {"image_url": "image", "input_image": "image", "input_audio": "audio", "audio_url": "audio"}
PARTS |= {kind: kind for kind in KINDS} | {"video_url": "video"}
# Where in a file's first bytes its format shows.
IMAGES = re.compile(
    rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF....WEBP|BM|II\*\0|MM\0\*|....ftyp(?:avif|heic|mif1)", re.S
)
SOUNDS = re.compile(rb"RIFF....WAVE|ID3|fLaC|OggS|\xff[\xf2\xf3\xfa\xfb]|....ftyp|\x1a\x45\xdf\xa3|FORM....AIF", re.S)
FORMATS = {
    "image": (IMAGES, "PNG, JPEG, GIF, WebP, BMP, TIFF, AVIF or HEIC"),
    "audio": (SOUNDS, "WAV, MP3, FLAC, Ogg, M4A, WebM or AIFF"),
}
START = 32  # bytes that tell


def content(value: Any, may_lack: bool = False) -> tuple[str, tuple[Media, ...]]:
    """A message's text and media: of a string, or of a list of parts.

    Raises:
        Unusable: it is neither, or a part is of no known kind.
    """
    if value is None and may_lack:
        return "", ()
    if is_text(value):
        return value, ()
    if not isinstance(value, list):
        raise Unusable("not_text", f"a message's content is {type(value).__name__}, not text")
    return _together(_part(part) for part in value)


def _part(part: Any) -> Piece:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text":
        text = part.get("text")
        if not is_text(text):
            raise Unusable("not_text", f"a message's part of type text holds {type(text).__name__}")
        return text
    if kind not in PARTS:
        raise Unusable("not_text", f"a message's part is {kind or type(part).__name__}, not text, image or audio")
    for name in (kind, PARTS[kind], "path", "url", "base64", "data", "source"):
        if part.get(name) is not None:
            return Media(PARTS[kind], _source(part[name], PARTS[kind], name in ("base64", "data")))
    return Media(PARTS[kind])  # its place alone


def _source(value: Any, kind: str, encoded: bool = False) -> str:
    """Where one lies: of a path, a URL, a data: URI, or bytes, plain or in an object as `datasets` has it."""
    if isinstance(value, str) and value.strip():
        return f"data:{kind};base64,{value}" if encoded or isinstance(value, Bytes) else value.strip()
    for name in ("bytes", "data", "base64", "path", "url") if isinstance(value, dict) else ():
        if value.get(name):
            return _source(value[name], kind, name in ("bytes", "data", "base64"))
    raise Unusable("bad_media", f"its {kind} is no path, address or content")


def _together(found: Iterable[Piece]) -> tuple[str, tuple[Media, ...]]:
    try:
        return together(found)
    except ValueError as error:
        raise Unusable("bad_media", str(error)) from None


def beside(row: dict[str, Any], source: SourceSection) -> dict[str, list[str]]:
    """What columns beside the messages hold, by kind; of named columns only those that are named."""
    named = source.columns
    if named is not None:
        columns = {name: kind for kind, name in (("image", named.image), ("audio", named.audio)) if name}
    else:
        columns = COLUMNS
    found: dict[str, list[str]] = {}
    if columns.keys().isdisjoint(row):
        return found
    for name, kind in columns.items():
        value = row.get(name)
        if value is not None and value != [] and value != "":
            several = value if isinstance(value, list) else [value]
            found.setdefault(kind, []).extend(_source(one, kind) for one in several)
    return found


def placed(row: Conversation, columns: dict[str, list[str]]) -> Conversation:
    """The row with what its columns hold put where it belongs.

    Raises:
        Unusable: there are more or fewer than places for them.
    """
    for kind, sources in columns.items():
        if isinstance(row, Text):
            raise Unusable("bad_media", f"a plain text holds no {kind}; name columns to make it a conversation")
        if not _places(row, kind) and any(f"<{kind}>" in m.content for m in row.messages):
            row = row.map_messages(partial(_marked, kind=kind))
        if not _places(row, kind):
            row = _before_the_question(row, [Media(kind)] * len(sources))
        if (places := _places(row, kind)) != len(sources):
            raise Unusable("bad_media", f"has {len(sources)} {kind} files and {places} places for them")
        row = _each(row, partial(_named, kind=kind, waiting=iter(sources)))
    return row


def _named(one: Media, kind: str, waiting: Iterator[str]) -> Media:
    return replace(one, source=next(waiting)) if one.kind == kind and not one.source else one


def _places(row: Conversation, kind: str) -> int:
    return sum(one.kind == kind and not one.source for one in row.media)


def _each(row: Conversation, change: Callable[[Media], Media]) -> Conversation:
    return row.map_messages(lambda m: replace(m, media=tuple(map(change, m.media))) if m.media else m)


def _marked(message: Message, kind: str) -> Message:
    """The message with a place wherever its text has a mark, as `<image>`."""
    found: list[Piece] = []
    for piece in pieces(message.content, message.media) if message.media else [message.content]:
        if isinstance(piece, Media):
            found.append(piece)
            continue
        first, *others = piece.split(f"<{kind}>")
        found.append(first)
        for text in others:
            found += [Media(kind), text]
    text, media = _together(found)
    return replace(message, content=text, media=media)


def _before_the_question(row: Conversation, media: Sequence[Media]) -> Conversation:
    at = next((i for i, m in enumerate(row.messages) if m.role == "user"), None)
    if at is None:
        raise Unusable("bad_media", "has no user's message for what its columns hold to stand in")
    asked = row.messages[at]
    text, found = _together([*media, *(pieces(asked.content, asked.media) if asked.media else [asked.content])])
    asked = replace(asked, content=text, media=found)
    return replace(row, messages=(*row.messages[:at], asked, *row.messages[at + 1 :]))


@dataclass(frozen=True)
class Looked:
    """Looks at the images and sounds of rows: each must be there and of a known format.

    Attributes:
        folder: that paths are relative to; nothing outside of it is opened, nor what a link in it leads to out there.
    """

    folder: Path

    def __call__(self, row: Conversation) -> Conversation:
        """The row, with the digest of each.

        Raises:
            Unusable: one is missing, of no known format, or outside of the folder.
        """
        return _each(row, self._look)

    def _look(self, media: Media) -> Media:
        kind, source = media.kind, media.source
        if kind not in FORMATS:
            raise Unusable("bad_media", f"holds {kind}, which is not read")
        if not source:
            raise Unusable("bad_media", f"an {kind} part says not which")
        scheme = source.partition("://")[0] if "://" in source else ""
        if scheme.lower() in ELSEWHERE:
            return media
        if scheme:
            raise Unusable("bad_media", f"its {kind} is behind {scheme}://; known: {', '.join(ELSEWHERE)}")
        if source.startswith("data:"):
            held = _decoded(source, kind)
            _known(held, kind, "within the row")
            return replace(media, digest=hashlib.sha256(held).hexdigest()[:16])
        folder = self.folder.resolve()
        try:
            path = (folder / source).resolve()
            if not path.is_relative_to(folder):
                why = f"{kind} {_short(source)} lies outside of {folder}; see data.sources[].media_folder"
                raise Unusable("media_outside", why)
            with path.open("rb") as file:
                _known(file.read(START), kind, _short(source))
                file.seek(0)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError) as error:  # a null byte in a path is a ValueError
            why = "is not on disk" if isinstance(error, FileNotFoundError) else f"can't be read ({error})"
            raise Unusable("missing_media", f"{kind} {_short(source)} {why}") from None
        return replace(media, digest=digest[:16])


def _decoded(uri: str, kind: str) -> bytes:
    head, _, data = uri.partition(",")
    try:
        return base64.b64decode(data, validate=True) if head.endswith(";base64") else b""
    except (binascii.Error, ValueError) as error:
        raise Unusable("bad_media", f"its {kind} within the row is not base64 ({error})") from None


def _known(start: bytes, kind: str, where: str) -> None:
    shape, names = FORMATS[kind]
    if not shape.match(start):
        raise Unusable("bad_media", f"{kind} {where} is not {names}")


def _short(source: str) -> str:
    return source if len(source) <= 200 else f"{source[:200]}..."


def counted(row: Conversation) -> str:
    """What a row holds besides words, as in `2 image, 1 audio`."""
    kinds = [one.kind for one in row.media]
    return ", ".join(f"{kinds.count(kind)} {kind}" for kind in KINDS if kind in kinds)
