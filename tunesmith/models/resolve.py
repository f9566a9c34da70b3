"""A model's name -> a folder on this disk that holds its safetensors, tokenizer and template."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tunesmith.errors import ModelError, first_line, nearest
from tunesmith.models.catalogue import EMBEDDED
from tunesmith.models.section import ModelSection
from tunesmith.progress import Bar, bar, clock, say
from tunesmith.runs import hash_file, hash_json, need_room, whole_folder, write_json

UNPACKED = 2  # of how .gguf files are unpacked: a change unpacks them anew
HASHING = threading.Lock()
WANTED = ("*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt", "*.tiktoken")
CODE = ("*.py",)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
CONVERT = (
    "Pickle files can run code when they are opened. If you trust this one, convert it once: python -c "
    '"from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
    "M.from_pretrained('{0}').save_pretrained('{0}-safe'); T.from_pretrained('{0}').save_pretrained('{0}-safe')\""
)


@dataclass(frozen=True)
class ResolvedModel:
    """A base model on this disk.

    `identity` is a hash that changes with the weights, tokenizer or template: a hub commit or a hash of the
    content. `source` is one of embedded, folder, gguf, hub.
    """

    name: str
    path: Path
    source: str
    identity: str
    licence: str | None
    hub_id: str | None
    trust_remote_code: bool
    chat_template: str | None
    end_of_turn: str | None
    new_words: tuple[str, ...] = ()

    def as_dict(self) -> dict[str, str | bool | None]:
        return {
            "name": self.name,
            "source": self.source,
            "identity": self.identity,
            "licence": self.licence,
            "hub_id": self.hub_id,
            "trust_remote_code": self.trust_remote_code,
        }


def cache_folder() -> Path:
    """Where converted models are kept: TUNESMITH_CACHE, else ~/.cache/tunesmith."""
    return Path(os.environ.get("TUNESMITH_CACHE") or Path.home() / ".cache" / "tunesmith")


def resolve(section: ModelSection) -> ResolvedModel:
    """Find the model that a recipe names, fetching or converting it where that is needed.

    Raises:
        ModelError: no such model, a pickle checkpoint, remote code that is not allowed, a hub that can't be
            reached or refuses.
    """
    name = section.name
    path = Path(name).expanduser()
    licence = hub_id = None
    if name in EMBEDDED:
        known = EMBEDDED[name]
        licence, hub_id = known.licence, known.hub_id
        source, folder = "embedded", _from_gguf(known.path(name), name)
        identity = folder.name.rpartition("-")[2]
    elif path.is_file() and path.suffix == ".gguf":
        source, folder = "gguf", _from_gguf(path, path.stem)
        identity = folder.name.rpartition("-")[2]
    elif path.is_dir():
        source, folder = "folder", path
        _refuse_pickles({p.name for p in path.iterdir()}, str(path))
        identity = _content_hash(path, WANTED + CODE * section.trust_remote_code)
    elif name.count("/") == 1 and not name.startswith((".", "/", "~")) and path.suffix != ".gguf":
        source, hub_id = "hub", name
        folder = _from_hub(name, section.revision, WANTED + CODE * section.trust_remote_code)
        identity, licence = folder.name, _licence(folder)
    else:
        raise ModelError(
            f"no model '{name}'{nearest(name, EMBEDDED)}",
            where="model.name",
            fix=f"Give a folder or .gguf file that exists, a hub id (owner/name), or one of: {', '.join(EMBEDDED)}.",
        )
    _refuse_remote_code(folder, section)
    return ResolvedModel(
        name=name,
        path=folder,
        source=source,
        identity=identity,
        licence=licence,
        hub_id=hub_id,
        trust_remote_code=section.trust_remote_code,
        chat_template=section.chat_template,
        end_of_turn=section.end_of_turn,
        new_words=tuple(section.new_words),
    )


def only_pickles(files: set[str]) -> list[str]:
    """The pickle files among names, where no weights lie beside them that can be loaded."""
    if any(f.endswith(".safetensors") for f in files):
        return []
    return sorted(f for f in files if any(Path(f).match(pattern) for pattern in PICKLES))


def _refuse_pickles(files: set[str], where: str) -> None:
    if any(f.endswith(".safetensors") for f in files):
        return
    if pickles := only_pickles(files):
        raise ModelError(
            f"only has pickle weights ({', '.join(pickles[:3])}), which are never loaded",
            where=where,
            fix=CONVERT.format(where),
        )
    raise ModelError(
        "holds no model: no .safetensors file",
        where=where,
        fix="Give the folder that holds config.json and *.safetensors.",
    )


def _refuse_remote_code(folder: Path, section: ModelSection) -> None:
    if not (folder / "config.json").is_file():
        raise ModelError("has no config.json", where=str(folder), fix="Give the whole model folder.")
    asks = False
    for file in (folder / "config.json", folder / "tokenizer_config.json"):
        if file.is_file():
            try:
                asks |= "auto_map" in dict(json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError) as error:
                raise ModelError(
                    f"is not a JSON object ({error})", where=str(file), fix="Fetch the model again."
                ) from error
    if asks and not section.trust_remote_code:
        raise ModelError(
            f"model '{section.name}' brings its own Python code, which only runs where the recipe allows it",
            where="model.trust_remote_code",
            fix=f"Read the code in {folder}; then write model: {{name: {section.name}, trust_remote_code: true}}.",
        )


def _content_hash(folder: Path, wanted: Sequence[str]) -> str:
    """Hash of the files that make the model."""
    return hash_json(_hashes(sorted(p for pattern in wanted for p in folder.glob(pattern))))


def folder_hash(folder: Path) -> str:
    """Sixteen letters that change with a model's or adapter's weights, settings or tokenizer."""
    return _content_hash(folder, WANTED)[:16]


def _hashes(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of files by name. They are remembered, since models are gigabytes, as long as the system says that a file
    was not touched: copies keep a file's size and time of writing, but not its time of change (ctime) and number."""
    memory = cache_folder() / "hashes.json"
    with HASHING:
        try:
            known: dict[str, str] = json.loads(memory.read_text())
        except (OSError, ValueError):
            known = {}
        hashes = {}
        before = len(known)
        for path in paths:
            stat = path.stat()
            key = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"
            known[key] = hashes[path.name] = known.get(key) or hash_file(path)
        if len(known) != before:
            memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(memory, known)
    return hashes


def _from_gguf(file: Path, name: str) -> Path:
    """A safetensors folder made from a .gguf file, once; found again by the file's hash."""
    from filelock import FileLock

    mark = hash_json([_hashes([file])[file.name], UNPACKED])[:16]
    folder = cache_folder() / "models" / f"{name}-{mark}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not (folder / "config.json").is_file():
            need_room(folder.parent, 8 * file.stat().st_size, f"Unpacking {file.name}")
            say(f"Unpacking {name} into {folder} (once; about half a minute for each 100 MB)")
            # About 0.3 s a MB on two cores; the library below tells nothing that a bar could show.
            with clock(f"Unpacking {name}", file.stat().st_size * 0.3e-6), whole_folder(folder) as temporary:
                _unpack(file, temporary)
    return folder


def _unpack(file: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

    from tunesmith.models.gguf_vocab import take_apart
    from tunesmith.models.load import silence

    silence()
    modeling_gguf_pytorch_utils.tqdm = lambda tensors, **_: tensors  # the one bar that its own switch forgets
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        unknown = take_apart(tokenizer, file)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except Exception as error:  # a damaged file fails in as many ways as it has fields
        raise ModelError(
            f"can't be read as a model ({first_line(error)})",
            where=str(file),
            fix="Check the file, or give the model's safetensors folder instead.",
        ) from error
    if unknown:
        say(f"{file.name} takes text apart as '{unknown}', which is not known here: its tokens may be others")
    if hasattr(model.config, "quantization_config"):  # the weights are dense now
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _from_hub(name: str, revision: str | None, wanted: Sequence[str]) -> Path:
    import httpx2
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where, patterns, size = f"model.name: {name}", [*wanted, "README.md"], 0
    try:
        # Without a network, what was fetched earlier still does.
        with contextlib.suppress(httpx2.NetworkError, httpx2.TimeoutException):
            if not constants.HF_HUB_OFFLINE:
                info = HfApi().model_info(name, revision=revision)
                _refuse_pickles({s.rfilename for s in info.siblings or []}, name)
                files = snapshot_download(name, revision=revision, allow_patterns=patterns, dry_run=True)
                size = sum(f.file_size or 0 for f in files if f.will_download)
                need_room(Path(constants.HF_HUB_CACHE), size, "The model", "Free some room, or set HF_HOME elsewhere.")
        with bar(f"Fetching {name}", size or None) as progress:
            counter = _byte_counter(progress)
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns, tqdm_class=counter))
    except GatedRepoError as error:
        raise ModelError(
            "is gated: its owner must let you in",
            where=where,
            fix="Ask for access on its page, then set HF_TOKEN to your token.",
        ) from error
    except RevisionNotFoundError as error:
        raise ModelError(f"has no revision '{revision}'", where=where, fix="Check model.revision.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            "is not on the hub, or is private",
            where=where,
            fix="Check the spelling; for a private model set HF_TOKEN. A folder is given by its path (./name).",
        ) from error
    except HFValidationError as error:
        raise ModelError(f"is not a hub id ({error})", where=where, fix="Write owner/name.") from error
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        raise ModelError(
            "is not on this disk, and the hub can't be reached",
            where=where,
            fix="Check the network and HF_HUB_OFFLINE, or give a folder that holds the model.",
        ) from error
    except (HfHubHTTPError, httpx2.HTTPError, OSError) as error:
        raise ModelError(
            f"could not be fetched ({type(error).__name__}: {first_line(error)})",
            where=where,
            fix="Try again, or give a folder that holds the model.",
        ) from error
    _refuse_pickles({p.name for p in folder.iterdir()}, str(folder))
    return folder


def _byte_counter(progress: Bar) -> type:
    """What huggingface_hub takes for its own bars: hands the bytes that reach the disk to ours."""
    from tqdm import tqdm

    class Counter(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.counts = str(kwargs.get("desc", "")).startswith("Reconstructing")
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            if self.counts:
                progress.advance(n or 0)

    return Counter


def _licence(folder: Path) -> str | None:
    """The licence that a model's card names. Read from disk, so that it is the same without a network."""
    from huggingface_hub import ModelCard

    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        named = ModelCard.load(card).data.get("license")
    except (ValueError, yaml.YAMLError):  # a card may be anything
        return None
    return named if isinstance(named, str) else None
