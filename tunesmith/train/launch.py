"""Several ranks on this machine, started by torch's elastic agent (what torchrun is), and what ended them."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith import errors
from tunesmith.errors import Interrupted, MachineError, TunesmithError
from tunesmith.models.machine import machine

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # where the agent looks for a rank's last words
MARK = "TUNESMITH_LAUNCHED"
TIME_TO_SAVE = 3600  # seconds that ranks have for finishing a step after Ctrl-C or SIGTERM
LINGER = 5.0  # seconds that the other ranks leave to the first one, to speak for all
CLOSED = (signal.SIGTERM, signal.SIGINT)  # what the agent ends the others with


def launch(arguments: Sequence[str], nproc: int) -> None:
    """Run `tunesmith ARGUMENTS` as so many ranks, and return when all of them are through.

    Raises:
        TunesmithError: what ended the first rank that ended, with its number where it was not the first.
    """
    given = dict(os.environ)
    cores = machine().cores  # measured once here, not by all ranks at the same time; they set what it asks for
    os.environ.clear()
    os.environ.update(given | environment(cores, nproc, given))
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.disable(logging.ERROR)  # the agent's notes: what they tell is told in one sentence here
    with tempfile.TemporaryDirectory(prefix="tunesmith-ranks-") as logs:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=Path(logs).name,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs),
            shutdown_timeout=TIME_TO_SAVE,
        )
        ended: dict[int, int] = {}
        try:
            elastic_launch(config, sys.executable)("-m", "tunesmith", *arguments)
            return
        except ChildFailedError as error:
            ended = {rank: failure.exitcode for rank, failure in error.failures.items()}
        except SignalException:
            pass
        raise _why(ended, _last_words(Path(logs)), nproc)


def environment(cores: int, nproc: int, given: Any) -> dict[str, str]:
    """What ranks get besides `given`: their share of the cores, and an allocator that reuses big buffers.

    glibc's settings are those of `models.machine.reuse_buffers`, from the first byte on; another allocator that is
    preloaded does not read them.
    """
    wanted = {
        MARK: "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # DDP's advice on parameters that might have been unused
        "OMP_NUM_THREADS": str(max(1, cores // nproc)),
        "MALLOC_MMAP_THRESHOLD_": str(2**30),
        "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
        "MALLOC_TOP_PAD_": str(2**26),
    }
    return {name: value for name, value in wanted.items() if name not in given}


def hand_up(error: TunesmithError) -> bool:
    """Leave an error where the agent looks for it; whether that is all (the launcher or the first rank will speak).

    The first rank speaks for all where all met the same error, so the others give it the time.
    """
    file, rank = os.environ.get(ERROR_FILE), int(os.environ.get("RANK") or 0)
    if not file:
        return False
    told = {"message": str(error), "extraInfo": {"py_callstack": str(error), "timestamp": str(int(time.time()))}}
    Path(file).write_text(json.dumps({"message": told, "error": error.as_dict()}), encoding="utf-8")
    if rank:
        time.sleep(LINGER)
    return bool(rank) or MARK in os.environ


def _last_words(logs: Path) -> dict[int, dict[str, Any]]:
    """The errors that ranks left, by rank (the agent names their folders so)."""
    found = {}
    for file in logs.rglob("error.json"):
        told = json.loads(file.read_text(encoding="utf-8")).get("error")
        if told:
            found[int(file.parent.name)] = told
    return found


def _why(ended: dict[int, int], words: dict[int, dict[str, Any]], nproc: int) -> TunesmithError:
    """The one error that says why all ranks ended.

    A rank that was killed, or met an error that is no echo of another's end, is the reason; the first of them.
    """
    echoes = {rank for rank, told in words.items() if told["type"] == "RankLost"}
    killed = {rank for rank, code in ended.items() if code < 0 and -code not in CLOSED}
    spoke = set(words) - echoes
    silent = {rank for rank in ended if rank not in words and -ended[rank] not in CLOSED}
    for reasons in (spoke, killed, silent, echoes):
        if reasons:
            rank = min(reasons)
            break
    else:
        return Interrupted("stopped", fix="The same command does what is left.")
    if rank in words:
        told = words[rank]
        what = told["what"] if rank == 0 else f"rank {rank} of {nproc}: {told['what']}"
        kind: type[TunesmithError] = getattr(errors, told["type"], TunesmithError)
        return kind(what, where=told["where"], fix=told["fix"])
    code = ended[rank]
    name = f" ({signal.Signals(-code).name})" if code < 0 else ""
    memory = "; the system may have run out of memory" if code == -signal.SIGKILL else ""
    return MachineError(
        f"rank {rank} of {nproc} ended with exit code {code}{name}{memory}; the other ranks were stopped",
        fix="The same command goes on from the last checkpoint.",
    )
