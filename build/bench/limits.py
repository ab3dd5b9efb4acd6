"""`python -m build.bench.limits LEVEL,LEVEL`: measure this machine's limits for each line of its input, as JSON.

Reading: every thread sums its part of a large array, in the fastest of several ways. Arithmetic: every thread
multiplies and adds numbers that never leave its registers, or that lie in its L1 cache. No product can be faster than
either, so each figure of the bench is given as a share of one of them. The number of threads is TVM_NUM_THREADS.
"""

import os
import sys
from collections.abc import Sequence
from statistics import median

import msgspec

from build.bench.machine_limits import Limit, MachineLimits, Prepared
from build.bench.probes import Probe, best_reader, peak_probes, read_probes
from build.bench.timing import in_turns
from build.kernels.cpu.level import LEVELS, runnable_levels

SECONDS = 0.2  # of each limit in one measurement


def main(names: str) -> None:
    """Compile the kernels for levels of these names, and measure until the input ends."""
    levels = [level for level in LEVELS if level.name in names.split(",")]
    threads = int(os.environ["TVM_NUM_THREADS"])
    widest = runnable_levels()[0]
    reader = best_reader(widest, threads)
    [reading] = read_probes(widest, threads, [reader])
    peaks = {level.name: peak_probes(level, threads) for level in levels}
    _print(Prepared(str(reader)))
    for _ in sys.stdin:
        _print(measured(reading, peaks))


def measured(reading: Probe, peaks: dict[str, dict[str, Probe]]) -> MachineLimits:
    """Measure all limits in turns."""
    probes = [reading, *(probe for level in peaks.values() for probe in level.values())]
    samples = in_turns([probe.call for probe in probes], SECONDS * len(probes))
    found = iter(_limit(probe, taken) for probe, taken in zip(probes, samples, strict=True))
    return MachineLimits(next(found), {level: {name: next(found) for name in names} for level, names in peaks.items()})


def _limit(probe: Probe, seconds: Sequence[float]) -> Limit:
    return Limit(probe.rate(min(seconds)), probe.rate(median(seconds)))


def _print(record: Prepared | MachineLimits) -> None:
    print(msgspec.json.encode(record).decode(), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
