"""`python -m tests.soak --minutes N [--artifact FOLDER]`: random schedules with new seeds, compared bit for bit.

They run on the tiny artifacts of the tests, or on one of yours. A seed that fails is printed and can be run again.
"""

import argparse
import tempfile
import time
from pathlib import Path

from runtime.engines.engine import Engine
from tests.helpers.artifacts import CASES, compiled
from tests.helpers.checked_schedules import check_schedule


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--artifact", type=Path, help="an artifact that you have compiled, in place of tiny ones")
    parser.add_argument("--seed", type=int, help="run this seed alone")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folders = [args.artifact] if args.artifact else [compiled(case, Path(name)).artifact for case in CASES]
        engines = [Engine.open(folder, threads=2) for folder in folders]
        seed, end = args.seed if args.seed is not None else int(time.time()), time.monotonic() + 60 * args.minutes
        while True:
            for engine in engines:
                print(f"seed {seed} on {engine.folder.name}", end="", flush=True)
                check_schedule(engine, seed)
                print(": the same bits")
            seed += 1
            if args.seed is not None or time.monotonic() > end:
                return


if __name__ == "__main__":
    main()
