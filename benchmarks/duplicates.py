"""Rows per second and peak memory: read, clean and take out exact and near duplicates, beside other tools.

    python benchmarks/duplicates.py [--rows 1000000] [--sides ours,datasketch,pandas,datasets] [--grow 10000,100000]

First: pip install -c constraints.txt 'tunesmith[bench]'. The rows are made (seeded): sentences of a made-up language
in support tickets, of which a tenth repeat another exactly and a tenth with a word changed. Every side runs in a
process of its own and reads the same JSONL file.

ours        data.clean: unicode, duplicates exact, then near (MinHash of 125 permutations, true Jaccard of 0.8)
datasketch  the same words' runs in datasketch's MinHashLSH of 125 permutations in 25 bands, rows inserted and queried
plain       ours without the near step: what pandas and datasets do
pandas      read, the same Unicode mending, drop_duplicates
datasets    load, map with the same mending, duplicates by a set of hashes
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIDES = ("ours", "datasketch", "plain", "pandas", "datasets")


def make(path: Path, rows: int) -> None:
    """Write made rows: a tenth repeat an earlier one, a tenth nearly so."""
    draw = random.Random(7)
    words = ["".join(draw.choice("abcdefghijklmnoprstuvz") for _ in range(draw.randint(2, 9))) for _ in range(20_000)]
    kept: list[tuple[list[str], list[str]]] = []
    with path.open("w", encoding="utf-8") as file:
        for _ in range(rows):
            chance = draw.random()
            if kept and chance < 0.2:
                asked, answered = draw.choice(kept)
                if chance < 0.1:
                    asked = [*asked]
                    asked[draw.randrange(len(asked))] = draw.choice(words)
            else:
                asked, answered = ([draw.choice(words) for _ in range(draw.randint(15, 45))] for _ in range(2))
                if len(kept) < 100_000:
                    kept.append((asked, answered))
            file.write(json.dumps({"prompt": " ".join(asked), "completion": " ".join(answered)}) + "\n")


def ours(path: Path, near: bool = True) -> int:
    from tunesmith.data.clean.duplicates import Duplicates
    from tunesmith.data.clean.run import Cleaning
    from tunesmith.data.clean.step import Around
    from tunesmith.data.clean.unicode import Unicode
    from tunesmith.data.ledger import Ledger
    from tunesmith.data.prepare import detect
    from tunesmith.data.section import SourceSection
    from tunesmith.data.sources import read_rows

    source = SourceSection(path=str(path))
    layout = detect(source, path)
    rows = [layout.read(row, source, f"{path.name}:{n}") for n, row in read_rows(source, path)]
    steps = {"unicode": Unicode(), "duplicates": Duplicates(kind="exact")}
    parts = Cleaning(steps, lambda row: None, Ledger()).before_split({"train": rows}, Around())
    if near:
        again = Cleaning({"duplicates": Duplicates(kind="near")}, lambda row: None, Ledger())
        parts = again.before_split(parts, Around())
    return len(parts["train"])


def datasketch(path: Path) -> int:
    from datasketch import MinHash, MinHashLSH

    from tunesmith.data.clean.minhash import normalised
    from tunesmith.data.clean.unicode import Unicode

    mend = Unicode().mend
    lsh, seen, kept = MinHashLSH(num_perm=125, params=(25, 5)), set(), 0
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file):
            row = json.loads(line)
            text = normalised(f"{mend(row['prompt'])}\n{mend(row['completion'])}")
            if text in seen:
                continue
            seen.add(text)
            words = text.split()
            sketch = MinHash(num_perm=125)
            sketch.update_batch([" ".join(words[i : i + 3]).encode() for i in range(max(len(words) - 2, 1))])
            if any(sketch.jaccard(lsh_sketches[other]) >= 0.8 for other in lsh.query(sketch)):
                continue
            lsh.insert(number, sketch)
            lsh_sketches[number] = sketch
            kept += 1
    return kept


lsh_sketches: dict[int, object] = {}


def pandas(path: Path) -> int:
    import pandas

    from tunesmith.data.clean.unicode import Unicode

    mend = Unicode().mend
    frame = pandas.read_json(path, lines=True)
    for column in ("prompt", "completion"):
        frame[column] = frame[column].map(mend)
    return len(frame.drop_duplicates())


def datasets(path: Path) -> int:
    from datasets import disable_progress_bars, load_dataset

    from tunesmith.data.clean.unicode import Unicode

    disable_progress_bars()
    mend = Unicode().mend
    with tempfile.TemporaryDirectory() as cache:
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        rows = rows.map(lambda row: {k: mend(v) for k, v in row.items()})
        seen: set[tuple[str, str]] = set()

        def first(row: dict[str, str]) -> bool:
            key = (row["prompt"], row["completion"])
            return key not in seen and not seen.add(key)

        return len(rows.filter(first))


def run(side: str, path: Path) -> dict[str, float]:
    """One side, in this process: rows kept, seconds and peak memory in MiB, its libraries' loading left out."""
    before = {"ours": "rensa, ftfy", "plain": "rensa, ftfy"}.get(side, f"{side}, ftfy")
    exec(f"import {before}")
    for module in ("tunesmith.data.prepare", "tunesmith.data.clean.run"):
        __import__(module)
    start = time.perf_counter()
    kept = {"plain": lambda p: ours(p, near=False)}.get(side, globals().get(side))(path)
    taken = time.perf_counter() - start
    return {"kept": kept, "seconds": taken, "mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--grow", default="", help="further numbers of rows, for ours alone: 10000,100000,10000000")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one[0], Path(options.one[1]))))
        return
    sizes = [(options.rows, side) for side in options.sides.split(",")]
    sizes += [(int(n), "ours") for n in options.grow.split(",") if n]
    print("| side | rows | kept | seconds | rows a second | peak MiB |\n" + "| --- " * 6 + "|")
    with tempfile.TemporaryDirectory() as folder:
        for rows, side in sizes:
            path = Path(folder) / f"{rows}.jsonl"
            if not path.exists():
                make(path, rows)
            done = subprocess.run(
                [sys.executable, __file__, "--one", side, str(path)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                print(f"| {side} | {rows:,} | failed: {done.stderr.strip().splitlines()[-1]} |")
                continue
            told = json.loads(done.stdout.strip().splitlines()[-1])
            cells = (
                f"{told['kept']:,}",
                f"{told['seconds']:.1f}",
                f"{rows / told['seconds']:,.0f}",
                f"{told['mib']:,.0f}",
            )
            print(f"| {side} | {rows:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
