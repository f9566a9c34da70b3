"""A data set of the hub -> its files of one split, at a revision that is then fixed.

Files are read by our own readers rather than built by `datasets`, so that a broken row is one rejected row
with its line and not a table that can't be cast. Which files make a split follows the card's `configs`, else
the names, as `datasets` reads them (huggingface.co/docs/datasets/repository_structure).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from tunesmith.data.opening import endings
from tunesmith.data.section import SourceSection
from tunesmith.errors import DataError, first_line, nearest
from tunesmith.progress import bar

# In order of preference, where a set holds its rows in several formats.
READABLE = ("parquet", "arrow", "jsonl", "ndjson", "json", "csv", "tsv", "txt", "md", "html")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
CARDS = ("readme.md", "licence.txt", "license.txt", "requirements.txt", "dataset_infos.json", "dataset_info.json")


def fetch_set(source: SourceSection, key: str) -> tuple[SourceSection, list[Path]]:
    """The files of a source's split, and the source with the revision (a commit) that they are of.

    Raises:
        DataError: no such set, subset, split or revision; gated; code instead of rows; a hub that can't be reached.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    name = str(source.hub)
    source = source.model_copy(update={"split": source.split or "train"})
    where = f"{key}: {name}"
    with _told(where, source.revision):
        commit, there = _listing(name, source.revision)
        wild = [f for f in there if ".." in PurePosixPath(f).parts or f.startswith("/") or "\\" in f]
        if wild:
            raise DataError(f"names a file outside of itself ({wild[0]})", where=where, fix="Don't use this set.")
        configs: list[dict[str, Any]] = []
        if "README.md" in there:
            card = Path(hf_hub_download(name, "README.md", repo_type="dataset", revision=commit))
            configs = _configs(card.read_text(encoding="utf-8", errors="replace"))
        chosen = _by_card(configs, there, source, where) if configs else _by_name(there, source, where)
        with bar(f"Fetching {name}"):
            folder = Path(
                snapshot_download(
                    name, repo_type="dataset", revision=commit, allow_patterns=[_literal(f) for f in chosen]
                )
            )
    return source.model_copy(update={"revision": commit}), [folder / f for f in chosen]


def _listing(name: str, revision: str | None) -> tuple[str, list[str]]:
    """A set's commit and files: the hub's, or without a network those that were fetched earlier."""
    import httpx2
    from huggingface_hub import HfApi, constants, snapshot_download

    with contextlib.suppress(httpx2.NetworkError, httpx2.TimeoutException):
        if not constants.HF_HUB_OFFLINE:
            info = HfApi().dataset_info(name, revision=revision)
            return str(info.sha), [s.rfilename for s in info.siblings or []]
    folder = Path(snapshot_download(name, repo_type="dataset", revision=revision, local_files_only=True))
    return folder.name, [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]


def _configs(card: str) -> list[dict[str, Any]]:
    """The subsets that a card's header names, each with its files."""
    found = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
    try:
        header = yaml.safe_load(found[1]) if found else None
    except yaml.YAMLError:  # a card may be anything
        return []
    configs = header.get("configs") if isinstance(header, dict) else None
    return [c for c in configs or [] if isinstance(c, dict) and ("data_files" in c or "data_dir" in c)]


def _by_card(configs: list[dict[str, Any]], there: Sequence[str], source: SourceSection, where: str) -> list[str]:
    wanted_split = source.split or "train"
    names = [str(c.get("config_name", "default")) for c in configs]
    default = next((n for n, c in zip(names, configs, strict=True) if c.get("default")), None)
    wanted = source.subset or default or (names[0] if len(names) == 1 else "default")
    if wanted not in names:
        raise DataError(
            f"has no subset '{wanted}'{nearest(wanted, names)}" if source.subset else "has several subsets",
            where=where,
            fix=f"Name one (data.sources[].subset): {', '.join(names)}.",
        )
    config = configs[names.index(wanted)]
    base = str(config.get("data_dir", "") or "").strip("/")
    inside = [f for f in there if f.startswith(f"{base}/")] if base else list(there)
    files = config.get("data_files")
    if not files:
        return _by_name(inside, source.model_copy(update={"subset": None}), where)
    listed = files if isinstance(files, list) else [files]
    patterns: dict[str, list[str]] = {}
    for entry in listed:
        split, path = (entry.get("split", "train"), entry.get("path")) if isinstance(entry, dict) else ("train", entry)
        patterns.setdefault(str(split), []).extend(str(p) for p in (path if isinstance(path, list) else [path]))
    if wanted_split not in patterns:
        raise DataError(
            f"has no split '{wanted_split}'{nearest(wanted_split, patterns)}", where=where,
            fix=f"Name one (data.sources[].split): {', '.join(patterns)}.",
        )  # fmt: skip
    whole = [f"{base}/{p}" if base else p for p in patterns[wanted_split]]
    chosen = [f for f in inside if f in whole or any(_matches(f, p) for p in whole)]
    if not chosen:
        raise DataError(f"holds no file for {', '.join(whole)}", where=where, fix="Choose another split or revision.")
    return sorted(chosen)


def _matches(name: str, pattern: str) -> bool:
    """Whether a glob pattern takes a file, as on a disk: `*` stays within a folder and takes no hidden file, `**/` is
    any number of folders."""
    from fsspec.utils import glob_translate

    parts = [part if part == "**" else re.sub(r"\*+", "*", part) for part in pattern.split("/")]
    hidden = re.search(r"(^|/)\.", name) and not re.search(r"(^|/)\.", pattern)
    return not hidden and re.match(glob_translate("/".join(parts)), name) is not None


def _by_name(there: Sequence[str], source: SourceSection, where: str) -> list[str]:
    wanted = source.split or "train"
    files = [f for f in there if _kind(f) and PurePosixPath(f).name.lower() not in CARDS]
    folders = {part for f in files for part in PurePosixPath(f).parts[:-1]}
    if source.subset:
        files = [f for f in files if source.subset in PurePosixPath(f).parts or _has_word(f, source.subset)]
        if not files:
            raise DataError(
                f"has no subset '{source.subset}'{nearest(source.subset, folders)}", where=where,
                fix=f"Its folders: {', '.join(sorted(folders)) or 'none'}.",
            )  # fmt: skip
    if not files:
        code = any(f.endswith(".py") for f in there)
        raise DataError(
            "brings its own Python code in place of rows, which is never run" if code else "holds no file of rows",
            where=where,
            fix="The hub keeps a copy in Parquet of many such sets: revision: refs/convert/parquet, and its subset."
            if code
            else f"Files that are read end in: {', '.join(READABLE)}.",
        )
    of = {split: [f for f in files if any(_has_word(f, w) for w in words)] for split, words in SPLITS.items()}
    of.setdefault(wanted, [f for f in files if _has_word(f, wanted)])
    named = {split for split, found in of.items() if found}
    chosen = of[wanted] if named else (files if wanted == "train" else [])
    if not chosen:
        raise DataError(
            f"has no split '{wanted}'", where=where,
            fix=f"It has: {', '.join(sorted(named)) or 'one split, train'} (data.sources[].split).",
        )  # fmt: skip
    best = min((_kind(f) for f in chosen), key=READABLE.index)
    chosen = sorted(f for f in chosen if _kind(f) == best)
    subsets = {PurePosixPath(f).parts[0] for f in chosen if len(PurePosixPath(f).parts) > 1}
    subsets -= {"data", *(w for words in SPLITS.values() for w in words)}
    if len(subsets) > 1 and not source.subset:
        raise DataError(
            "has several subsets", where=where, fix=f"Name one (data.sources[].subset): {', '.join(sorted(subsets))}."
        )
    return chosen


def _kind(name: str) -> str:
    found = endings(Path(name))
    return found[-1] if found and found[-1] in READABLE else ""


def _has_word(path: str, word: str) -> bool:
    """Whether a path names a word that stands for itself: `data/train-00000.jsonl` has train, `retrained` not."""
    return re.search(rf"(?<![a-z0-9]){re.escape(word.lower())}(?![a-z])", path.lower()) is not None


def _literal(name: str) -> str:
    return re.sub(r"([*?\[])", r"[\1]", name)


@contextlib.contextmanager
def _told(where: str, revision: str | None) -> Iterator[None]:
    """The hub's refusals as sentences."""
    import httpx2
    from huggingface_hub import errors

    def error(what: str, fix: str) -> DataError:
        return DataError(what, where=where, fix=fix)

    try:
        yield
    except errors.GatedRepoError as e:
        raise error("is gated: its owner must let you in", "Ask on its page, then set HF_TOKEN to your token.") from e
    except errors.RevisionNotFoundError as e:
        raise error(f"has no revision '{revision}'", "Check data.sources[].revision.") from e
    except errors.RepositoryNotFoundError as e:
        raise error(
            "is not a data set of the hub, or is private", "Check the name; for a private one set HF_TOKEN."
        ) from e
    except errors.HFValidationError as e:
        raise error(f"is not a hub id ({first_line(e)})", "Write owner/name.") from e
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as e:
        raise error(
            "is not on this disk, and the hub can't be reached",
            "Check the network and HF_HUB_OFFLINE, or name files of your own by `path`.",
        ) from e
    except (errors.HfHubHTTPError, httpx2.HTTPError, OSError) as e:
        raise error(f"could not be fetched ({type(e).__name__}: {first_line(e)})", "Try again.") from e
