"""The data card: what lies in a prepared folder, for people and for the hub; and DVC's note of the folder."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

PARTS = ("train", "validation", "test")


def card(told: Mapping[str, Any], accounts: Sequence[Mapping[str, Any]]) -> str:
    """A README.md with the hub's front matter, so that `datasets.load_dataset(folder)` finds the parts."""
    counts = told["counts"]
    files = [{"split": part, "path": f"{part}.jsonl"} for part in PARTS if counts[part]]
    front = {"configs": [{"config_name": "default", "data_files": files}], "tags": ["tunesmith"]}
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).rstrip(),
        "---",
        "",
        "# Prepared data",
        "",
        f"Version `{told['version']}`: a hash of the rows themselves. Made by Tunesmith from the sources below.",
        "",
        "| part | rows |",
        "| --- | --- |",
        *(f"| {part} | {counts[part]:,} |" for part in PARTS),
        "",
        f"Rows are of kind {told['rows']}; answers are of kind {told['answers']['kind']}. Of {counts['read']:,} rows "
        f"read, {counts['rejected']:,} were rejected (rejected.jsonl) and {sum(counts['removed'].values()):,} removed "
        "(removed.jsonl), each with its reason.",
        "",
        "## Sources",
        "",
        "| file | SHA-256 |",
        "| --- | --- |",
        *(f"| {Path(path).name} | `{digest}` |" for path, digest in told["inputs"].items()),
        "",
        "## Cleaning",
        "",
    ]
    if not accounts:
        lines.append("No cleaning steps were named; personal data was not looked for.")
    else:
        lines += ["| step | settings | changed | removed | listed |", "| --- | --- | --- | --- | --- |"]
        for a in accounts:
            settings = json.dumps(a["settings"], ensure_ascii=False).replace("|", "\\|")
            lines.append(f"| {a['step']} | `{settings}` | {a['changed']:,} | {a['removed']:,} | {a['flagged']:,} |")
        if not any(a["step"] == "personal" for a in accounts):
            lines += ["", "Personal data was not looked for (`clean: {personal: ...}`)."]
    return "\n".join(lines) + "\n"


def dvc_note(folder: Path) -> str:
    """The content of a `.dvc` file for a folder, as `dvc add` would write it: its files' MD5s, hashed.

    `dvc commit` on it puts the folder into DVC's cache.
    """
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listed = [{"md5": _md5(p), "relpath": p.relative_to(folder).as_posix()} for p in files]
    listed.sort(key=lambda f: f["relpath"])
    whole = hashlib.md5(json.dumps(listed, sort_keys=True).encode(), usedforsecurity=False).hexdigest()
    out = {
        "md5": f"{whole}.dir",
        "size": sum(p.stat().st_size for p in files),
        "nfiles": len(files),
        "hash": "md5",
        "path": folder.name,
    }
    return yaml.safe_dump({"outs": [out]}, sort_keys=False)


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()


def dvc_stage(name: str, command: Sequence[str], wdir: str, needs: Sequence[str], made: str) -> str:
    """The content of a `dvc.yaml` with one stage, which makes a prepared set: `dvc repro` runs the command anew once a
    file that it needs has changed. Paths are relative to `wdir`, and that to the file's folder."""
    stage = {"wdir": wdir, "cmd": shlex.join(command), "deps": list(needs), "outs": [made]}
    return yaml.safe_dump({"stages": {name: stage}}, sort_keys=False, width=1000)
