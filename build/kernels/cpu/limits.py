"""Two kernels that compute nothing of use: the least that reading memory costs, and the most that multiply-adds give."""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.level import Level

STREAM = 4  # vectors that a thread reads at a time


def read_all(level: Level, threads: int, vectors: int) -> PrimFunc:
    """Kernel of data (threads * vectors * STREAM * lanes,) float32 to out (threads * lanes,): every thread adds up its part."""
    lanes = level.lanes

    @T.prim_func
    def kernel(data: T.Buffer((threads * vectors * STREAM * lanes,), "float32"), out: T.Buffer((threads * lanes,), "float32")):
        T.func_attr({"tirx.noalias": True})
        for thread in T.parallel(threads):
            sums = T.alloc_buffer((STREAM * lanes,), "float32")
            for i in T.unroll(STREAM):
                for v in T.vectorized(lanes):
                    sums[i * lanes + v] = T.float32(0)
            for n in T.serial(vectors):
                for i in T.unroll(STREAM):
                    for v in T.vectorized(lanes):
                        sums[i * lanes + v] = sums[i * lanes + v] + data[((thread * vectors + n) * STREAM + i) * lanes + v]
            for v in T.vectorized(lanes):
                out[thread * lanes + v] = sums[v]
            for i in T.unroll(STREAM - 1):
                for v in T.vectorized(lanes):
                    out[thread * lanes + v] = out[thread * lanes + v] + sums[(i + 1) * lanes + v]

    return kernel


def multiply_add(level: Level, threads: int, chains: int, steps: int) -> PrimFunc:
    """Kernel of factors (2 * lanes,) float32 to out (threads * lanes,): `chains` registers of each thread, `steps` times x = x * a + b."""
    lanes = level.lanes

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
            for v in T.vectorized(lanes):
                out[thread * lanes + v] = sums[v]
            for i in T.unroll(chains - 1):
                for v in T.vectorized(lanes):
                    out[thread * lanes + v] = out[thread * lanes + v] + sums[(i + 1) * lanes + v]

    return kernel
