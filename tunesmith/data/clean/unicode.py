"""`data.clean.unicode`: text that was broken on its way is mended."""

from __future__ import annotations

import html
import re

from tunesmith.data.clean.step import MendStep

# Control and format characters that say nothing in a text. Kept: tab, line end, and the joiners that scripts and emoji
# need (U+200C, U+200D).
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")
LINE_ENDS = re.compile("\r\n?|[\x85\u2028\u2029]")
SPACES = re.compile("[\u00a0\u1680\u2000-\u200a\u202f\u205f\u3000]")
TRAILING = re.compile(r"[ \t]+(?=\n|$)")
BLANK_LINES = re.compile(r"\n{3,}")
TAGS = "p|div|span|br|hr|b|i|u|em|strong|small|font|center|h[1-6]|ul|ol|li|table|thead|tbody|tr|td|th|a|img|blockquote"
TAG = re.compile(rf"</?(?:{TAGS})(?:\s[^<>]*)?/?>", re.IGNORECASE)
BREAKS = re.compile(r"<(?:br|hr)\s*/?>|</(?:p|div|li|tr|h[1-6]|blockquote)>", re.IGNORECASE)
HIDDEN = re.compile(r"<(script|style)\b[^<>]*>.*?</\1\s*>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
ENTITY = re.compile(r"&(?:[a-zA-Z][a-zA-Z0-9]{1,31}|#\d{1,7}|#[xX][0-9a-fA-F]{1,6});")
FENCED = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)


class Unicode(MendStep):
    """Mend text that was broken on its way: wrongly decoded characters (ftfy), control characters, line ends and
    spaces, remnants of HTML. Code between backticks keeps its tags and entities, and every line its indentation."""

    encoding: bool = True
    """Mend text that was decoded wrongly ("cafÃ©"), and compose accents (NFC)."""
    control: bool = True
    """Leave out control characters and invisible marks."""
    whitespace: bool = True
    """One kind of line end and space; none at line ends; at most one blank line."""
    html: bool = True
    """Leave out tags of formatting, comments, scripts and styles, and write entities as their characters."""

    def mend(self, text: str) -> str:
        """A text, mended."""
        if self.encoding:
            text = _decoded(text)
        plain = text.isascii()  # most texts: then a glance saves most of the searching
        if self.whitespace and ("\r" in text or not plain):
            text = LINE_ENDS.sub("\n", text)
        if self.html and ("<" in text or "&" in text):
            text = "".join(p if p.startswith("`") else _plain(p) for p in FENCED.split(text))
        if self.control and not (plain and text.replace("\n", "").replace("\t", "").isprintable()):
            text = CONTROL.sub("", text)
        if not self.whitespace:
            return text
        if not text.isascii():
            text = SPACES.sub(" ", text)
        if " \n" in text or "\t\n" in text or text[-1:] in (" ", "\t"):
            text = TRAILING.sub("", text)
        return (BLANK_LINES.sub("\n\n", text) if "\n\n\n" in text else text).strip("\n")


def _decoded(text: str) -> str:
    if text.isascii():
        return text
    import ftfy

    config = ftfy.TextFixerConfig(
        unescape_html=False,
        remove_terminal_escapes=True,
        fix_encoding=True,
        restore_byte_a0=True,
        replace_lossy_sequences=True,
        decode_inconsistent_utf8=True,
        fix_c1_controls=True,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        fix_surrogates=True,
        remove_control_chars=False,
        normalization="NFC",
    )
    return str(ftfy.fix_text(text, config))


def _plain(text: str) -> str:
    """Text without tags and entities. Tags only count as HTML where one is closed or breaks a line: `<b>` alone in a
    question about HTML stays."""
    text = HIDDEN.sub("", text)
    if re.search(rf"</(?:{TAGS})\s*>|<(?:br|hr|img)\b[^<>]*>", text, re.IGNORECASE):
        text = TAG.sub("", BREAKS.sub("\n", text))
    return ENTITY.sub(lambda found: html.unescape(found.group()), text)
