"""How many tasks the threads of a product share."""

import pytest
import tvm_ffi
from tvm import tirx

from build.kernels.cpu.level import LEVELS
from build.kernels.cpu.linear import linear
from build.kernels.shapes import Linear
from export.weights.format import Storage

THREADS = 64
# (N, K) of a layer's smallest matrices in models of 1.1 and of 7 billion parameters
SIZES = [(2048, 2048), (2048, 5632), (4096, 14336)]
LEVEL = next(level for level in LEVELS if level.name == "avx512-vnni")


def parallel_loops(kernel):
    """Numbers of tasks of each launch."""
    found = []
    tvm_ffi.structural_walk(
        kernel.body,
        (tirx.For, lambda loop: found.append(int(loop.extent)) if loop.kind == tirx.ForKind.PARALLEL else None),
    )
    return found


@pytest.mark.parametrize("rounding", ["none", "int8"])
@pytest.mark.parametrize("rows", [1, 128])
def test_no_thread_is_without_work(rows, rounding):
    """Every product is divided into at least as many tasks as there are threads, but for the rows that are packed."""
    stored = Storage(dtype="int8", rounding=rounding)
    for n, k in SIZES:
        *packing, product = parallel_loops(linear(LEVEL, Linear((1, rows), n, k, stored)))
        assert product >= THREADS, (n, k)
        assert len(packing) == (rows > 1)  # one row is packed by one thread
        assert all(tasks >= min(rows, THREADS) for tasks in packing)


def test_threads_share_no_cache_line():
    """A task writes whole panels of float32 outputs, which are whole lines of 64 bytes."""
    (tasks,) = parallel_loops(linear(LEVEL, Linear((1, 1), 2048, 256, Storage(dtype="float32"))))
    assert 2048 * 4 / tasks % 64 == 0
