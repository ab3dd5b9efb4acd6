"""Two kernels that compute nothing useful, but show the least cost of reading memory and the peak of multiply-adds."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.level import Level
from build.kernels.cpu.vector import clear


def read_all(level: Level, threads: int, streams: int, vectors: int) -> PrimFunc:
    """Kernel from data (threads * streams * vectors * 4 * lanes,) float32 to out (threads * lanes,): sums per thread.

    Each thread adds up its part. It reads `streams` runs of `vectors` times four adjacent vectors: the more runs, the
    more cache lines are in flight from memory.
    """
    lanes = level.lanes
    join = _join(lanes, 4 * streams)

    @T.prim_func
    def kernel(
        data: T.Buffer((threads * streams, vectors, 4 * lanes), "float32"), out: T.Buffer((threads * lanes,), "float32")
    ):
        T.func_attr({"tirx.noalias": True})
        for thread in T.parallel(threads):
            sums = T.alloc_buffer((streams * 4 * lanes,), "float32")
            clear(sums, 4 * streams, lanes)
            for n in T.serial(vectors):
                for s in T.unroll(streams):
                    for i in T.unroll(4):
                        for v in T.vectorized(lanes):
                            sums[(s * 4 + i) * lanes + v] = (
                                sums[(s * 4 + i) * lanes + v] + data[thread * streams + s, n, i * lanes + v]
                            )
            join(sums, out, thread)

    return kernel


def multiply_add(level: Level, threads: int, chains: int, steps: int) -> PrimFunc:
    """Kernel from factors (2 * lanes,) float32 to out (threads * lanes,): chains of multiply-adds.

    Each thread computes x = x * a + b `steps` times in each of `chains` registers.
    """
    lanes = level.lanes
    join = _join(lanes, chains)

    @T.prim_func
    def kernel(factors: T.Buffer((2 * lanes,), "float32"), out: T.Buffer((threads * lanes,), "float32")):
        T.func_attr({"tirx.noalias": True})
        for thread in T.parallel(threads):
            sums = T.alloc_buffer((chains * lanes,), "float32")
            for i in T.unroll(chains):
                for v in T.vectorized(lanes):
                    sums[i * lanes + v] = factors[v] + T.Cast("float32", i)
            for _ in T.serial(steps):
                for i in T.unroll(chains):
                    for v in T.vectorized(lanes):
                        sums[i * lanes + v] = sums[i * lanes + v] * factors[v] + factors[lanes + v]
            join(sums, out, thread)

    return kernel


def _join(lanes: int, vectors: int):
    """Inline `join(sums, out, thread)`: add up a thread's vectors, so that the compiler cannot drop any of them."""

    @T.inline
    def join(sums, out, thread):
        for v in T.vectorized(lanes):
            out[thread * lanes + v] = sums[v]
        for i in T.unroll(vectors - 1):
            for v in T.vectorized(lanes):
                out[thread * lanes + v] = out[thread * lanes + v] + sums[(i + 1) * lanes + v]

    return join
