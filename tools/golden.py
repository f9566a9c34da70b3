"""Write the golden curves of tests/golden anew: all, or the cases that are named.

A curve that is within tolerance of the one that is kept stays as it is, with the environment in which it was made, so
that only what moved shows in a diff. `--check` writes nothing, and ends with 1 where one moved.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))


def main() -> None:
    from tests import curves
    from tunesmith.progress import quiet

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", help=f"of: {', '.join(curves.CASES)}")
    parser.add_argument("--check", action="store_true", help="write nothing")
    asked = parser.parse_args()
    unknown = [name for name in asked.cases if name not in curves.CASES]
    if unknown:
        parser.error(f"no case is called '{unknown[0]}'")
    quiet()
    differ = False
    with tempfile.TemporaryDirectory() as folder:
        for name in asked.cases or curves.CASES:
            steps = curves.trained(name, Path(folder))
            there = (curves.GOLDEN / f"{name}.json").exists() and curves.kept(name)["case"] == curves.CASES[name]
            why = curves.moved(curves.kept(name)["steps"], steps) if there else "new"
            print(f"{name:26} {why or 'as it was'}", flush=True)
            differ |= bool(why)
            if why and not asked.check:
                curves.keep(name, steps)
    if asked.check and differ:
        sys.exit(1)


if __name__ == "__main__":
    main()
