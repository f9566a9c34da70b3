"""A metric of the user's own: a Python function named in the recipe, as `checks.py:politeness` or `package.mine:name`.

The function is given (answer, reference, metadata) and returns a number or True/False; the metric is its mean.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError, first_line, nearest
from tunesmith.evaluate.metrics.base import Answers, Floats, Metric, mean, rows

MOST = 1e100  # of one row's score: what can be added up and squared


def function(name: str, folder: Path) -> Callable[..., Any]:
    """The function that a recipe names; files are relative to the recipe's folder.

    Raises:
        RecipeError: no such file, module or function, or it fails when it is loaded.
    """
    where, _, attribute = name.rpartition(":")
    fix = "Name it as file.py:function or package.module:function."
    try:
        if where.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(where).stem, folder / Path(where).expanduser())
            assert spec and spec.loader
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(where)
    except (Exception, SystemExit) as error:  # the user's code may raise anything, or end the program
        what = f"can't be loaded ({type(error).__name__}: {first_line(error)})"
        raise RecipeError(what, where=f"evaluate.metrics: {name}", fix=fix) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        what = f"has no function '{attribute}'{nearest(attribute, known)}"
        raise RecipeError(what, where=f"evaluate.metrics: {name}", fix=fix)
    return found


def custom(name: str, folder: Path) -> Metric:
    """The mean of a user's function over the rows; `higher_is_better = False` on the function turns it round."""
    score = function(name, folder)

    def stats(answers: Answers) -> Floats:
        metadata = answers.metadata or [{}] * len(answers.given)
        found = []
        for given, reference, row in zip(answers.given, answers.references, metadata, strict=True):
            try:
                value = float(score(given, reference, row))
                if not abs(value) <= MOST:  # nor NaN
                    raise ValueError(f"it gave {value}")
                found.append(value)
            except (Exception, SystemExit) as error:
                what = f"failed on an answer ({type(error).__name__}: {first_line(error)})"
                fix = f"The answer was {given[:80]!r}; the function must give a number for any text."
                raise RecipeError(what, where=f"evaluate.metrics: {name}", fix=fix) from error
        return rows(found)

    return Metric(name.rpartition(":")[2], stats, mean, higher_is_better=getattr(score, "higher_is_better", True))
