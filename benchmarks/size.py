"""Rows per second and peak memory: read, clean and take out exact and near duplicates, beside other tools.

    python benchmarks/size.py [--rows 1000000] [--sides ours,datasketch,...] [--rounds 3] [--grow 10000,...,10000000]
    python benchmarks/size.py --rows 5000 --grow 2000,10000        # a small run
    python benchmarks/size.py --rows 100000 --sides ours,ray,spark
    python benchmarks/size.py --sides '' --grow 10000,100000,1000000,5000000,10000000   # growth alone

First: pip install -c constraints.txt 'tunesmith[bench]'; for ray and spark also 'tunesmith[ray,spark]', and Java 17.
The rows are made (seeded): words of a made-up language; a tenth of the rows repeat another exactly, a tenth with a word
changed. Every side runs in a process of its own and reads the same JSONL file. Memory is the largest sum of what the
process and its children hold (PSS where the system tells it), looked at ten times a second. In each round every side
has its turn, so that a machine that slows down slows all of them; the table tells the median round. `--sample` gives
datasketch, whose index lies in memory, the first so many rows alone; the table says how many. Disk: about two kilobytes
a row, so 20 GB for ten million.

ours        data.clean: unicode, duplicates: near, which takes exact ones along (MinHash of 125 permutations in 25
            bands, then true Jaccard), all cores
whole       all of `tunesmith data prepare` with these steps: also split, counted in tokens, and written
one         the same as ours in one process
ray, spark  the same on these engines, with starting them
datasketch  the same words' runs in datasketch's MinHashLSH of 125 permutations in 25 bands, rows inserted and queried
rensa       the same in rensa's RMinHashLSH, signatures of 4,096 rows at a time
plain       ours with duplicates: exact, which is what pandas and datasets do
pandas      read, the same Unicode mending, drop_duplicates
datasets    load, map with the same mending on all cores, duplicates by a set of hashes
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

SIDES = ("ours", "datasketch", "rensa", "plain", "pandas", "datasets")
ENGINES = {"one": {"kind": "local", "processes": 1}, "ray": "ray", "spark": "spark"}


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


def ours(path: Path, near: bool = True, engine: Any = "local") -> int:
    from tunesmith.data.clean.duplicates import Duplicates
    from tunesmith.data.clean.run import Cleaning
    from tunesmith.data.clean.step import Around
    from tunesmith.data.clean.unicode import Unicode
    from tunesmith.data.ledger import Ledger
    from tunesmith.data.reading import read_parts, usable
    from tunesmith.data.section import DataSection
    from tunesmith.data.shelf import Shelf
    from tunesmith.data.sources import source_files

    section = DataSection(sources=[str(path)], engine=engine)
    steps = {"unicode": Unicode(), "duplicates": Duplicates(kind="near" if near else "exact")}
    with tempfile.TemporaryDirectory(dir=path.parent) as name, section.engine.start(Path(name)) as running:
        shelf, ledger = Shelf(Path(name)), Ledger()
        parts = read_parts(section, source_files(section, path.parent), running, shelf, ledger)
        around = Around(engine=running, scratch=shelf.folder)
        return len(Cleaning(steps, usable, ledger, shelf).before_split(parts, around)["train"])


def whole(path: Path) -> int:
    from tunesmith.sets import prepare

    data = {"sources": [str(path)], "clean": {"unicode": True, "duplicates": "near"}}
    recipe = {"model": "smollm2-135m-instruct", "data": data, "train": {"max_length": 4096}}
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        file = Path(name) / "whole.yaml"
        file.write_text(json.dumps(recipe), encoding="utf-8")
        return int(prepare(str(file), runs_folder=name).manifest["counts"]["accepted"])


def runs_of(path: Path) -> Iterator[list[bytes]]:
    """Each row's runs of three words, once for rows of the same words."""
    from tunesmith.data.clean.minhash import normalised
    from tunesmith.data.clean.unicode import Unicode

    mend, seen = Unicode().mend, set()
    with path.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            text = normalised(f"{mend(row['prompt'])}\n{mend(row['completion'])}")
            if text not in seen:
                seen.add(text)
                words = text.split()
                yield [" ".join(words[i : i + 3]).encode() for i in range(max(len(words) - 2, 1))]


def datasketch(path: Path) -> int:
    from datasketch import MinHash, MinHashLSH

    lsh, kept = MinHashLSH(num_perm=125, params=(25, 5)), []
    for runs in runs_of(path):
        sketch = MinHash(num_perm=125)
        sketch.update_batch(runs)
        if not any(sketch.jaccard(kept[other]) >= 0.8 for other in lsh.query(sketch)):
            lsh.insert(len(kept), sketch)
            kept.append(sketch)
    return len(kept)


def rensa(path: Path) -> int:
    from rensa import RMinHash, RMinHashLSH

    lsh, kept, rows = RMinHashLSH(0.8, 125, 25), [], runs_of(path)
    while some := list(islice(rows, 4096)):
        for sketch in RMinHash.from_token_sets(some, 125, 7):
            if not any(sketch.jaccard(kept[other]) >= 0.8 for other in lsh.query(sketch)):
                lsh.insert(len(kept), sketch)
                kept.append(sketch)
    return len(kept)


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
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=path.parent) as cache:
        rows = load_dataset("json", data_files=str(path), split="train", cache_dir=cache)
        rows = rows.map(lambda row: {k: mend(v) for k, v in row.items()}, num_proc=cores)
        seen: set[tuple[str, str]] = set()

        def first(row: dict[str, str]) -> bool:
            key = (row["prompt"], row["completion"])
            return key not in seen and not seen.add(key)

        return len(rows.filter(first))


class Peak:
    """The largest memory that this process and its children have held, in MiB."""

    def __init__(self) -> None:
        self.mib, self._through = 0.0, threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> Peak:
        self._watch.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._through.set()
        self._watch.join()

    def _look(self) -> None:
        import psutil

        this = psutil.Process()
        over = False
        while not over:
            over = self._through.wait(0.1)
            held = 0
            for process in [this, *this.children(recursive=True)]:
                try:
                    info = process.memory_full_info()
                    held += getattr(info, "pss", info.uss)
                except psutil.Error:
                    continue  # it has ended meanwhile
            self.mib = max(self.mib, held / 2**20)


def run(side: str, path: Path) -> dict[str, float]:
    """One side, in this process: rows kept, seconds and peak MiB, after a few rows that load its libraries."""
    tools = {"datasketch": datasketch, "rensa": rensa, "pandas": pandas, "datasets": datasets, "whole": whole}

    def turn(path: Path) -> int:
        return tools[side](path) if side in tools else ours(path, side != "plain", ENGINES.get(side, "local"))

    few = path.parent / "few.jsonl"
    make(few, 200)
    turn(few)
    with Peak() as peak:
        start = time.perf_counter()
        kept = turn(path)
        taken = time.perf_counter() - start
    return {"kept": kept, "seconds": taken, "mib": peak.mib}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--rounds", type=int, default=1, help="how often each side has its turn; the median counts")
    parser.add_argument("--sample", type=int, help="how many of the rows datasketch gets; all if not given")
    parser.add_argument("--grow", default="", help="further numbers of rows, for one side alone: 10000,100000,10000000")
    parser.add_argument("--grows", default="ours", choices=["ours", "whole"], help="the side that grows")
    parser.add_argument("--folder", help="where the rows and what is made of them lie; about six times their size")
    parser.add_argument("--one", nargs=2, metavar=("SIDE", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one[0], Path(options.one[1]))))
        return
    sides = [side for side in options.sides.split(",") if side]
    found: dict[tuple[str, int], list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for _ in range(options.rounds):
            for side in sides:
                rows = min(options.sample or options.rows, options.rows) if side == "datasketch" else options.rows
                found.setdefault((side, rows), []).append(measured(folder, side, rows))
        print(HEAD)
        for (side, rows), told in found.items():
            print(line(side, rows, told))
        grown: dict[int, float] = {}
        for rows in (int(n) for n in options.grow.split(",") if n):
            told = measured(folder, options.grows, rows)
            print(line(options.grows, rows, [told]), flush=True)
            grown |= {rows: told["seconds"]} if "seconds" in told else {}
            (folder / f"{rows}.jsonl").unlink()
        if grown:
            few, many = min(grown), max(grown)
            print(f"\n{many / few:,.0f} times the rows take {grown[many] / grown[few]:,.0f} times the time.")
            print(f"Aim at any number of rows: under {MOST_MIB:,} MiB.")
    speeds = {side: rows / median(told)["seconds"] for (side, rows), told in found.items() if median(told)}
    for other, speed in speeds.items():
        mine = "plain" if other in PLAIN else "ours"
        if other not in (mine, "whole") and mine in speeds:
            print(f"{mine} : {other} = {speeds[mine] / speed:.2f}")


HEAD = "| side | rows | kept | seconds | rows a second | peak MiB |\n" + "| --- " * 6 + "|"
MOST_MIB = 2048
PLAIN = ("pandas", "datasets")  # which have no step for near-duplicates, and stand beside `plain`


def measured(folder: Path, side: str, rows: int) -> dict[str, Any]:
    """A side's turn, in a process of its own; {failed: why} where it failed."""
    path = folder / f"{rows}.jsonl"
    if not path.exists():
        make(path, rows)
    command = [sys.executable, __file__, "--one", side, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": (done.stderr.strip().splitlines() or ["no word"])[-1]}
    told: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    print(f"{side}, {rows:,} rows: {told['seconds']:.1f} s", file=sys.stderr, flush=True)
    return told


def median(told: list[dict[str, Any]]) -> dict[str, Any]:
    """The median round by its seconds; nothing where all failed."""
    whole = sorted((one for one in told if "failed" not in one), key=lambda one: float(one["seconds"]))
    return whole[len(whole) // 2] if whole else {}


def line(side: str, rows: int, told: list[dict[str, Any]]) -> str:
    one = median(told)
    if not one:
        return f"| {side} | {rows:,} | failed: {told[0]['failed']} | | | |"
    cells = (f"{one['kept']:,}", f"{one['seconds']:.1f}", f"{rows / one['seconds']:,.0f}", f"{one['mib']:,.0f}")
    return f"| {side} | {rows:,} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
