"""`python -m build.bench.limits THREADS CPU`: measure this machine's limits with our own kernels, as JSON.

Reading: every thread sums its part of a large array. Arithmetic: every thread multiplies and adds numbers that never
leave its registers. No product can be faster than either, so each figure of the bench is given as a share of one of
them.
"""

import os
import sys
import time
from math import prod
from typing import Any

import msgspec
import numpy as np

from build.bench.report import MachineLimits
from build.compiler import llvm_target, tvm
from build.kernels.cpu.level import level_of
from build.kernels.cpu.limits import multiply_add, read_all
from build.tvm_stage.cpu_levels import NATIVE, native_cpu
from runtime.artifact.cpu import machine_features

BYTES = 2**28  # many times the size of any last-level cache
PASSES = 7
STREAMS = 3  # that a thread reads at once; with two it reads a tenth less, and four need more registers than AVX2 has
# Independent sums of a thread: enough for two multiply-adds per cycle with a latency of 4, and they fit in 16
# registers.
CHAINS = 10
STEPS = 200_000


def measure(threads: int, cpu: str) -> MachineLimits:
    """Compile both kernels for `cpu` and time them.

    The thread pool takes its size from TVM_NUM_THREADS, which `main` sets.
    """
    level, cpu = level_of(machine_features()), native_cpu() if cpu == NATIVE else cpu
    lanes = level.lanes
    vectors = BYTES // 4 // lanes // threads // STREAMS // 4
    read, multiply = read_all(level, threads, STREAMS, vectors), multiply_add(level, threads, CHAINS, STEPS)
    data = tvm.runtime.tensor(np.ones((threads * STREAMS, vectors, 4 * lanes), np.float32))
    out = tvm.runtime.tensor(np.zeros(threads * lanes, np.float32))
    factors = tvm.runtime.tensor(np.array([0.5] * lanes + [1.0] * lanes, np.float32))
    reading, arithmetic = (
        _best(_compiled(kernel, cpu), first, out) for kernel, first in ((read, data), (multiply, factors))
    )
    return MachineLimits(4 * prod(data.shape) / reading / 1e9, 2 * threads * STEPS * CHAINS * lanes / arithmetic / 1e9)


def _compiled(kernel: Any, cpu: str) -> Any:  # noqa: ANN401 (TVM's functions)
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    return tvm.compile(module, target=llvm_target(cpu))["kernel"]


def _best(kernel: Any, *arguments: Any) -> float:  # noqa: ANN401
    seconds = []
    for _ in range(PASSES):
        start = time.perf_counter()
        kernel(*arguments)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def main(threads: str, cpu: str) -> None:
    """Measure the limits and print them."""
    os.environ["TVM_NUM_THREADS"] = threads  # read at the pool's first use
    print(msgspec.json.encode(measure(int(threads), cpu)).decode())


if __name__ == "__main__":
    main(*sys.argv[1:])
