"""A job's own process: `python -m tunesmith.jobs.child`. It plans, waits for the word, and walks the recipe.

It reads orders from standard input and answers on standard output, a JSON object a line; what is printed goes to
standard error. It ends with the worker that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import IO, Any

from tunesmith.errors import (
    DataError,
    Interrupted,
    MachineError,
    ModelError,
    RecipeError,
    TrainingError,
    TunesmithError,
)

PR_SET_PDEATHSIG = 1
CODES = {
    DataError: ("invalid_training_file", "training_file"),
    RecipeError: ("invalid_settings", None),
    ModelError: ("model_error", "model"),
    MachineError: ("insufficient_resources", None),
    TrainingError: ("training_diverged", "hyperparameters"),
}
FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EFBIG, errno.EAGAIN)
SETTING = re.compile(r"(train|data|evaluate|goal|gate)(\.\w+)*")  # a key that a job may set
BUSY = "busy"  # another process still works in the run's folder


def main() -> None:
    orders, answers = sys.stdin, os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    end_with(int(sys.argv[1]))
    order = json.loads(orders.readline())
    try:
        if order["plan"]:
            plan = planned(order)
            tell(answers, plan)
            if not orders.readline():  # the worker has changed its mind
                return
            order["recipe"] = plan["recipe"]  # what whoever goes on is given too
        walk(order["recipe"], order["runs"], order["stages"])
        tell(answers, {"kind": "done"})
    except Interrupted as stop:
        tell(answers, {"kind": "stopped", "message": stop.what})
    except TunesmithError as error:
        tell(answers, told(error))
    except Exception as error:  # what nobody foresaw fails the job, instead of coming again with each worker
        traceback.print_exc()
        tell(answers, unforeseen(error))


def unforeseen(error: Exception) -> dict[str, Any]:
    """What is told of an error that is none of ours: a full machine by its name, others by their kind alone."""
    if isinstance(error, OSError) and error.errno in FULL:
        code, message = "insufficient_resources", f"{error.strerror}."
    else:
        code, message = "server_error", f"The job's process had an error ({type(error).__name__})."
    return {"kind": "error", "code": code, "message": message, "param": None}


def tell(answers: IO[str], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message) + "\n")
    answers.flush()


def planned(order: dict[str, Any]) -> dict[str, Any]:
    """Look at every row and foretell the training: numbers for every "auto", memory, seconds.

    The learning rate is the rule's times `order["multiplier"]`, unless the recipe has one of its own.
    """
    from tunesmith.preview import resolved

    recipe = json.loads(json.dumps(order["recipe"]))
    found = resolved(recipe)
    rate = found.train.learning_rate
    if recipe["train"]["learning_rate"] == "auto":
        rate *= order["multiplier"]
    adapter = {"adapter": found.train.adapter.model_dump(mode="json")} if "adapter" in recipe["train"] else {}
    recipe["train"] |= adapter | {
        "epochs": found.train.epochs,
        "batch_size": found.train.batch_size,
        "max_length": found.train.max_length,
        "learning_rate": rate,
    }
    return {
        "kind": "planned",
        "recipe": recipe,
        "beta": getattr(found.train.method, "beta", None),
        "steps": found.plan.steps,
        "seconds": found.plan.seconds,
        "memory": found.plan.peak_bytes,
        "advice": [str(change) for change in found.plan.changes],
        "counts": found.counts,
    }


def walk(recipe: dict[str, Any], runs: str, stages: list[str]) -> None:
    """Run the recipe, going on from what is there."""
    from tunesmith import pipeline
    from tunesmith.runs import Run

    there = Run(Path(runs) / recipe["name"])
    there.recipe.unlink(missing_ok=True)  # a run that another machine began has that one's paths
    pipeline.run(recipe, runs_folder=runs, stages=stages)


def told(error: TunesmithError) -> dict[str, Any]:
    if "being worked on by another process" in error.what:
        return {"kind": BUSY}
    code, param = next((c for kind, c in CODES.items() if isinstance(error, kind)), ("server_error", None))
    param = error.where if error.where and SETTING.fullmatch(error.where) else param
    # Where it lies on this machine is nobody's business who only uses it.
    where = f"{error.where}: " if error.where and "/" not in error.where else ""
    return {"kind": "error", "code": code, "message": f"{where}{error.what}", "param": param}


def end_with(parent: int, by: int = signal.SIGKILL) -> None:
    """Have the system send this process a signal when its parent dies, however that dies (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, by)
    if os.getppid() != parent:  # it died before it could be asked
        os._exit(1)


if __name__ == "__main__":
    main()
