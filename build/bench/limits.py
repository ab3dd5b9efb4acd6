"""`python -m build.bench.limits THREADS`: measure this machine's limits with our own kernels, as JSON.

Reading: every thread sums its part of a large array, in the fastest of several ways. Arithmetic: every thread
multiplies and adds numbers that never leave its registers. No product can be faster than either, so each figure of the
bench is given as a share of one of them.
"""

import os
import sys

import msgspec

from build.bench.probes import best_reader, peak_probes, read_probes
from build.bench.report import MachineLimits
from build.bench.timing import in_turns
from build.kernels.cpu.level import runnable_levels

SURVEY_SECONDS, SECONDS = 2.0, 0.3


def measure(threads: int) -> MachineLimits:
    """Compile the kernels and time them.

    The thread pool takes its size from TVM_NUM_THREADS, which `main` sets.
    """
    level = runnable_levels()[0]
    reading = read_probes(level, threads, [best_reader(level, threads, SURVEY_SECONDS)])[0]
    peak = peak_probes(level, threads)["float32"]
    read, multiplied = (probe.rate(in_turns([probe.call], SECONDS)[0]) for probe in (reading, peak))
    return MachineLimits(read, multiplied)


def main(threads: str) -> None:
    """Measure the limits and print them."""
    os.environ["TVM_NUM_THREADS"] = threads  # read at the pool's first use
    print(msgspec.json.encode(measure(int(threads))).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
