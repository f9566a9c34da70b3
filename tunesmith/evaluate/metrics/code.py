"""pass@k: the share of problems that one of k answers solves, by running each answer against the row's tests."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from math import comb

from tunesmith.errors import RecipeError
from tunesmith.evaluate.metrics import sandbox
from tunesmith.evaluate.metrics.base import Answers, Floats, Metric, mean, rows


def code_of(text: str) -> str:
    """The program in an answer: its fenced blocks, else all of it as it stands (its indentation counts)."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", text, re.DOTALL | re.IGNORECASE)
    return "\n".join(blocks) if blocks else text


def program(row: dict[str, str], answer: str) -> str:
    """An answer with its tests: `tests`, or HumanEval's `test` with its `prompt` and `entry_point`."""
    code = code_of(answer)
    if "entry_point" in row:
        if f"def {row['entry_point']}" not in code:  # it goes on where the prompt ends
            code = row["prompt"] + code
        return f"{code}\n\n{row['test']}\n\ncheck({row['entry_point']})\n"
    return f"{code}\n\n{row['tests']}\n"


def _passed(answers: Answers) -> list[list[bool]]:
    """Of each row, which of its answers passed."""
    rounds = answers.samples or [answers.given]
    if not answers.metadata or any("entry_point" not in row for row in answers.metadata):
        answers.told("tests", "pass@k")
    jobs = [program(dict(row), given[i]) for i, row in enumerate(answers.metadata) for given in rounds]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        passed = [outcome.passed for outcome in pool.map(sandbox.run, jobs)]
    return [passed[i : i + len(rounds)] for i in range(0, len(passed), len(rounds))]


def estimate(n: int, right: int, k: int) -> float:
    """The chance that k of n answers, of which `right` are, hold a right one (Chen et al. 2021, equation 1)."""
    return 1.0 - comb(n - right, k) / comb(n, k)


def _pass_at(k: int) -> Metric:
    def stats(answers: Answers) -> Floats:
        found = _passed(answers)
        if found and len(found[0]) < k:
            raise RecipeError(
                f"pass_at_{k} needs {k} answers to each prompt, and {len(found[0])} are asked for",
                where="evaluate.seeds",
                fix=f"Write evaluate: {{seeds: {k}, temperature: 0.8}}.",
            )
        return rows([estimate(len(p), sum(p), k) for p in found])

    return Metric(f"pass_at_{k}", stats, mean, joint=True)


pass_at_1, pass_at_5, pass_at_10 = _pass_at(1), _pass_at(5), _pass_at(10)
