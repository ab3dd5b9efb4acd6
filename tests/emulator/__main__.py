"""The CUDA kernels on an emulated GPU, in more cases than a test run has time for: `python -m tests.emulator`.

It prints a row for each run as it ends, and last what was wrong.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tests.emulator.kernels import EmulatedKernels
from tests.emulator.matrix import draws, layers, models, mutations, positions, random_shapes
from tests.emulator.matrix.rows import Row

Suite = Callable[[EmulatedKernels], Iterator[Row]]
SUITES: Mapping[str, Suite] = {
    "layers": layers.rows,
    "positions": positions.rows,
    "draws": draws.rows,
    "mutations": mutations.rows,
    "shapes": random_shapes.rows,
    "models": models.rows,
}


def main() -> int:
    """Run the suites; 1 if anything was wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.emulator", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", choices=SUITES, action="append", help="one of several suites (default: all)")
    arguments = parser.parse_args()
    np.seterr(all="ignore")
    wrong = []
    with TemporaryDirectory(prefix="emulator-") as folder:
        kernels = EmulatedKernels.load(Path(folder))
        for name in arguments.only or SUITES:
            start = time.monotonic()
            for row in SUITES[name](kernels):
                print(row, flush=True)
                wrong += [] if row.ok else [row]
            print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    print("\n".join(map(str, wrong)) or "nothing is wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
