"""Weak supervision: rules in a Python file vote on every row, and a label model weighs them (Ratner et al. 2017)."""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tunesmith.data.opening import Broken, Row
from tunesmith.data.section import SourceSection
from tunesmith.data.sources import read_rows
from tunesmith.errors import DataError, MachineError, first_line

Rule = Callable[[Row], str | None]
ABSTAIN = -1
FEWEST = 3  # rules from whose agreement their accuracies can be told


@dataclass(frozen=True)
class Labelled:
    """What the rules made of a file.

    Attributes:
        rows: those with a label, as they were, with `label` and `label_confidence`.
        unlabelled: the numbers of rows on which every rule abstained, or as many said one thing as another.
        broken: rows that can't be read: (number, why).
        rules: of each rule its labels, coverage, overlap, conflict, accuracy and errors.
        facts: how many rows, which labels, which model, accuracy where the truth is known.
    """

    rows: list[Row]
    unlabelled: list[int]
    broken: list[tuple[int, str]]
    rules: list[dict[str, Any]]
    facts: dict[str, Any]


def label(rules_file: Path, data: Path, truth: str | None = None, seed: int = 7) -> Labelled:
    """Label a file's rows by rules: functions of a row (a dict) that return a label, or None to abstain.

    Args:
        truth: a column that holds the right label in some rows, to measure with; it is not learnt from.

    Raises:
        DataError: the rules can't be loaded, none has an opinion, or a file can't be read.
        MachineError: snorkel is not installed.
    """
    rules = load_rules(rules_file)
    numbers: list[int] = []
    rows: list[Row] = []
    broken: list[tuple[int, str]] = []
    if not data.is_file():
        raise DataError(f"no such file: {data}", where="DATA", fix="Give the file that holds your rows.")
    for number, row in read_rows(SourceSection(path=str(data)), data):
        if isinstance(row, Broken):
            broken.append((number, row.why))
        else:
            numbers.append(number)
            rows.append(row)
    said, errors = _votes(rules, rows)
    labels = sorted({v for vote in said for v in vote if v is not None})
    if not labels:
        raise DataError(
            "no rule has an opinion on any row" + (f" ({next(iter(errors.values()))[1]})" if errors else ""),
            where=str(rules_file),
            fix="A rule takes a row (a dict) and returns a label, or None.",
        )
    place = {name: i for i, name in enumerate(labels)}
    votes_RF = np.array([[ABSTAIN if v is None else place[v] for v in vote] for vote in said])
    chances_RL, model, trust = _combined(votes_RF, len(labels), seed)
    ranked = np.sort(chances_RL, 1)
    sure = (votes_RF != ABSTAIN).any(1) & ((ranked[:, -1] - ranked[:, -2] > 1e-9) if len(labels) > 1 else True)
    best = chances_RL.argmax(1)
    right = np.array([place.get(str(row.get(truth)), ABSTAIN) for row in rows]) if truth else None
    known = right is not None and (right != ABSTAIN)
    facts: dict[str, Any] = {"rows": len(rows), "labelled": int(sure.sum()), "labels": labels, "model": model}
    if truth is not None:
        if not np.any(known):
            raise DataError(f"no row's '{truth}' is a label of the rules", where="--truth", fix="Check the column.")
        checked = sure & known
        facts["checked"] = int(checked.sum())
        facts["accuracy"] = round(float((best == right)[checked].mean()), 4) if checked.any() else None
    return Labelled(
        [
            row | {"label": labels[best[i]], "label_confidence": round(float(chances_RL[i].max()), 4)}
            for i, row in enumerate(rows)
            if sure[i]
        ],
        [number for i, number in enumerate(numbers) if not sure[i]],
        broken,
        _summary(rules, votes_RF, labels, trust, errors, right),
        facts,
    )


def load_rules(file: Path) -> dict[str, Rule]:
    """The functions that a Python file defines, in its order; names that begin with _ are helpers.

    The file is run: it is the user's own code, named on the command line and never taken from a recipe or a data set.
    """
    if not file.is_file():
        raise DataError(f"no such file: {file}", where="RULES", fix="Give a Python file of labelling functions.")
    spec = importlib.util.spec_from_file_location(f"rules_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise DataError("is not a Python file", where=str(file), fix="Its name must end in .py.")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise DataError(
            f"can't be loaded ({type(error).__name__}: {first_line(error)})", where=str(file), fix="Mend the file."
        ) from error
    found: dict[str, Rule] = {
        name: rule
        for name, rule in vars(module).items()
        if inspect.isfunction(rule) and rule.__module__ == module.__name__ and not name.startswith("_")
    }
    if not found:
        raise DataError("defines no function", where=str(file), fix="A rule: def name(row): return 'label' or None")
    return found


def _votes(rules: dict[str, Rule], rows: Sequence[Row]) -> tuple[list[list[str | None]], dict[str, tuple[int, str]]]:
    """What every rule says of every row; a rule that fails on a row abstains there, which is counted and told."""
    errors: dict[str, tuple[int, str]] = {}
    said = []
    for row in rows:
        votes = []
        for name, rule in rules.items():
            try:
                vote = rule(row)
            except Exception as error:
                times, first = errors.get(name, (0, f"{type(error).__name__}: {first_line(error)}"))
                errors[name] = (times + 1, first)
                vote = None
            votes.append(None if vote is None else str(vote))
        said.append(votes)
    return said, errors


def _combined(votes_RF: np.ndarray, labels: int, seed: int) -> tuple[np.ndarray, str, list[float] | None]:
    """Each row's chances of each label, by which model, and how far each rule is trusted where that is learnt.

    Fewer than three rules say nothing of one another's accuracy: their votes are counted.
    """
    counts_RL = np.stack([(votes_RF == i).sum(1) for i in range(labels)], 1).astype(float)
    shares_RL = counts_RL / np.maximum(counts_RL.sum(1, keepdims=True), 1)
    if votes_RF.shape[1] < FEWEST or labels < 2:
        return shares_RL, "majority vote", None
    try:
        from snorkel.labeling.model import LabelModel
    except ImportError as error:
        raise MachineError(
            f"weighing rules needs the package '{error.name}'", where="label",
            fix="Install it: pip install 'tunesmith[labels]'",
        ) from error  # fmt: skip
    with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
        warnings.simplefilter("ignore", FutureWarning)
        model = LabelModel(cardinality=labels, verbose=False)
        model.fit(votes_RF, n_epochs=500, seed=seed, progress_bar=False)
        chances, trust = model.predict_proba(votes_RF), model.get_weights()
    return np.asarray(chances), "snorkel's label model", [float(w) for w in trust]


def _summary(
    rules: dict[str, Rule],
    votes_RF: np.ndarray,
    labels: Sequence[str],
    trust: list[float] | None,
    errors: dict[str, tuple[int, str]],
    right: np.ndarray | None,
) -> list[dict[str, Any]]:
    spoke_RF = votes_RF != ABSTAIN
    told = []
    for f, name in enumerate(rules):
        mine = spoke_RF[:, f]
        others = np.delete(spoke_RF, f, 1)
        differ = others & (np.delete(votes_RF, f, 1) != votes_RF[:, [f]])
        line: dict[str, Any] = {
            "rule": name,
            "labels": ", ".join(labels[i] for i in sorted(set(votes_RF[mine, f].tolist()))),
            "coverage": round(float(mine.mean()), 4),
            "overlap": round(float((mine & others.any(1)).mean()), 4),
            "conflict": round(float((mine & differ.any(1)).mean()), 4),
        }
        if trust is not None:
            line["estimated accuracy"] = round(trust[f], 4)
        if right is not None:
            checked = mine & (right != ABSTAIN)
            agree = votes_RF[checked, f] == right[checked]
            line["accuracy"] = round(float(agree.mean()), 4) if checked.any() else None
            line["checked"] = int(checked.sum())
        if name in errors:
            line["errors"] = f"{errors[name][0]} ({errors[name][1]})"
        told.append(line)
    return told
