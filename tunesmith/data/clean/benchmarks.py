"""Public benchmarks by name: the data set of the hub that each is, and where its files lie."""

from __future__ import annotations

import re
from pathlib import Path

from tunesmith.data.section import SourceSection
from tunesmith.data.sources import matching
from tunesmith.errors import DataError, nearest

ARC, GLUE = "allenai/ai2_arc", "aps/super_glue"
# (data set, subset, split) of what lm-evaluation-harness asks, or the files that the name stands for.
KNOWN: dict[str, list[tuple[str, str | None, str]]] = {
    "arc": [(ARC, "ARC-Easy", "test"), (ARC, "ARC-Challenge", "test")],
    "arc_easy": [(ARC, "ARC-Easy", "test")],
    "arc_challenge": [(ARC, "ARC-Challenge", "test")],
    "boolq": [(GLUE, "boolq", "validation")],
    "commonsense_qa": [("tau/commonsense_qa", None, "validation")],
    "copa": [(GLUE, "copa", "validation")],
    "drop": [("EleutherAI/drop", None, "validation")],
    "gsm8k": [("openai/gsm8k", "main", "test")],
    "hellaswag": [("Rowan/hellaswag", None, "validation")],
    "humaneval": [("openai/openai_humaneval", None, "test")],
    "ifeval": [("google/IFEval", None, "train")],
    "math500": [("HuggingFaceH4/MATH-500", None, "test")],
    "mbpp": [("google-research-datasets/mbpp", "full", "test")],
    "mmlu": [("cais/mmlu", "all", "test")],
    "openbookqa": [("allenai/openbookqa", "main", "test")],
    "piqa": [("baber/piqa", None, "validation")],
    "triviaqa": [("mandarjoshi/trivia_qa", "rc.nocontext", "validation")],
    "truthfulqa": [("truthfulqa/truthful_qa", "generation", "validation")],
    "winogrande": [("allenai/winogrande", "winogrande_xl", "validation")],
}


def benchmark_files(name: str, folder: Path, local: str | None, key: str) -> list[Path]:
    """The files of a benchmark: of a path, or of a known name in the folder `local`, else of the hub.

    Raises:
        DataError: there are none, and the hub can't be reached or has none.
    """
    known = KNOWN.get(name.lower())
    if not re.fullmatch(r"\w[\w-]*", name) or (folder / name).is_file():
        return matching(name, folder, key)
    if local is not None:
        there = sorted(path for path in (folder / local).glob(f"{name}.*") if path.is_file())
        if there:
            return there
    names = ", ".join(sorted(KNOWN))
    if known is None:
        raise DataError(
            f"no benchmark is called '{name}'{nearest(name.lower(), KNOWN)}, and no file",
            where=key,
            fix=f"Name a file, or one of: {names}.",
        )
    from tunesmith.data.hub import fetch_set

    found: list[Path] = []
    for hub, subset, split in known:
        try:
            found += fetch_set(SourceSection(hub=hub, subset=subset, split=split), key)[1]
        except DataError as error:
            raise DataError(
                f"the benchmark {name} is {hub} of the hub, which {error.what}",
                where=key,
                fix=f"Name a folder that holds it as {name}.jsonl, .csv or .parquet (data.clean.contamination.folder), "
                f"or its file in place of its name. To fetch it: {error.fix}",
            ) from error
    return found
