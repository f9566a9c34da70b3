"""The rows of one source; and documents and exports made for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunesmith.data.opening import Broken
from tunesmith.data.section import DataSection
from tunesmith.data.sources import read_rows, source_files


def rows_of(folder: Path, **keys: Any) -> list[Any]:
    """The rows of one source: dicts as they are, broken ones by their reason."""
    files = source_files(DataSection(sources=[keys]), folder)["train"]
    found = [row for source, path in files for _, row in read_rows(source, path)]
    return [row.reason if isinstance(row, Broken) else row for row in found]


def pdf(text: str) -> bytes:
    """A one-page PDF that says a text, written by hand from the format's description."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]  # fmt: skip
    out, places = b"%PDF-1.4\n", []
    for number, content in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    table = b"".join(b"%010d 00000 n \n" % place for place in places)
    trailer = b"trailer << /Size 5 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(out)
    return out + b"xref\n0 5\n0000000000 65535 f \n" + table + trailer


def task(number: int, text: str, *labels: str, **more: Any) -> dict[str, Any]:
    """A text in an export of Label Studio, with the label of each annotator."""
    said = [
        {"completed_by": who, "result": [
            {"from_name": "sentiment", "to_name": "text", "type": "choices", "value": {"choices": [label]}}]}
        for who, label in enumerate(labels)
    ]  # fmt: skip
    return {"id": number, "data": {"text": text}, "annotations": said} | more
