"""The read bandwidth of this machine's memory, which decode is measured against.

`python -m runtime.engines.read_bandwidth [--threads N]` prints the bandwidth in GB/s.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from runtime.errors import UserError, run_command

ARRAY_BYTES = 2**28  # many times any last-level cache, so that every pass reads main memory
PASSES = 7
METHOD = f"best of {PASSES} passes in which each thread sums its part of {ARRAY_BYTES // 2**20} MiB of int64 with numpy"


def read_bandwidth(threads: int, nbytes: int = ARRAY_BYTES) -> float:
    """GB/s (1e9) that `threads` threads read together: the fastest of `PASSES` sums over `nbytes` of int64.

    numpy's integer sum is vectorized and releases the interpreter's lock, so the threads run side by side and memory is
    the bottleneck.
    """
    array = np.ones(nbytes // 8, np.int64)  # ones, not zeros: untouched zero pages all share one physical page
    parts = np.array_split(array, threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            start = time.perf_counter()
            total = sum(pool.map(np.add.reduce, parts))
            seconds.append(time.perf_counter() - start)
            assert total == array.size, f"sum {total} of {array.size} ones"
    return array.nbytes / min(seconds) / 1e9


def fresh_read_bandwidth(threads: int) -> float:
    """`read_bandwidth` in a separate process, so that its array does not count towards this one's peak memory."""
    command = [sys.executable, "-m", "runtime.engines.read_bandwidth", "--threads", str(threads)]
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the bandwidth."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.engines.read_bandwidth",
        description="Measure the read bandwidth of this machine's memory.",
    )
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="threads (default: all cores)"
    )
    threads = parser.parse_args(argv).threads
    if threads < 1:
        raise UserError(f"--threads is {threads}, expected at least 1")
    print(f"{read_bandwidth(threads):.3f}")
    return 0


if __name__ == "__main__":
    run_command(main)
