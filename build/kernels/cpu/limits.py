"""Kernels that compute nothing useful, but show the least cost of reading memory and the peaks of multiply-adds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cpu.amx import TILE_BYTES, multiply_bfloat16_tiles, multiply_tiles
from build.kernels.cpu.dot import Dot, WordDot
from build.kernels.cpu.level import Level
from build.kernels.cpu.pair_dot import PairDot
from build.kernels.cpu.tile_limits import PRODUCTS, TILE, TILE_SUMS, multiply_again
from build.kernels.cpu.vector import LINE, clear, prefetch
from export.weights.format import Storage
from export.weights.table import format_of
from runtime.artifact.layouts import DOT

FLOATS = LINE // 4  # float32 numbers in a cache line
AHEADS = (0, 512, 2048)  # bytes
TOGETHER = 4  # cache lines that are read in one step, of one stream or of several
# Independent sums of a thread: enough for two multiply-adds per cycle with a latency of 4, and they fit in 16
# registers.
CHAINS = 10
# Names of peaks.
FLOAT32, INT8, WORDS, PAIRS, AMX, AMX_PAIRS = "float32", "int8 dot", "int4 words", "bf16 dot", "AMX int8", "AMX bf16"
DEPTH = 64  # steps whose operands lie in the L1 cache


@dataclass(frozen=True)
class Reader:
    """One way to read memory: so many runs at once, each in order, prefetched so many bytes ahead, or not if 0."""

    streams: int
    ahead: int

    def __str__(self) -> str:
        runs = f"{self.streams} stream{'s' * (self.streams > 1)}"
        return f"{runs}, prefetched {self.ahead} bytes ahead" if self.ahead else runs

    @property
    def lines(self) -> int:
        """Adjacent cache lines of each stream that are read in one step."""
        return max(TOGETHER // self.streams, 1)

    def steps(self, nbytes: int, threads: int) -> int:
        """Steps in which each thread reads its part of at most `nbytes`."""
        return nbytes // (threads * self.streams * self.lines * LINE)

    def bytes_read(self, nbytes: int, threads: int) -> int:
        """How many of `nbytes` are read."""
        return self.steps(nbytes, threads) * threads * self.streams * self.lines * LINE


READERS = tuple(Reader(streams, ahead) for ahead in AHEADS for streams in (1, 2, 3, 4, 6, 8))


def read_all(level: Level, reader: Reader, threads: int, nbytes: int) -> PrimFunc:
    """Kernel from data (nbytes / 4,) float32 to out (threads * lanes,): the sums of each thread's part."""
    lanes, streams, steps, width = level.lanes, reader.streams, reader.steps(nbytes, threads), reader.lines * FLOATS
    vectors = streams * width // lanes  # that are read in one step, each into a sum of its own
    join = _join(lanes, vectors)

    @T.prim_func
    def kernel(data: T.Buffer((nbytes // 4,), "float32"), out: T.Buffer((threads * lanes,), "float32")):
        T.func_attr({"tirx.noalias": True})
        for thread in T.parallel(threads):
            sums = T.alloc_buffer((vectors * lanes,), "float32")
            clear(sums, vectors, lanes)
            for n in T.serial(steps):
                for s in T.unroll(streams):
                    at = ((thread * streams + s) * steps + n) * width
                    if reader.ahead > 0:
                        for line in T.unroll(reader.lines):
                            prefetch(data, at + reader.ahead // 4 + line * FLOATS)
                    for i in T.unroll(width // lanes):
                        for v in T.vectorized(lanes):
                            sums[s * width + i * lanes + v] = sums[s * width + i * lanes + v] + data[at + i * lanes + v]
            join(sums, out, thread)

    return kernel


@dataclass(frozen=True)
class Peak:
    """A kernel that shows how many multiplications and additions per second a level's instruction can do."""

    name: str
    kernel: Callable[[int, int], PrimFunc]  # from threads and the number of passes
    arguments: tuple[tuple[int, str], ...]  # sizes and dtypes of its inputs; then comes `out`
    out: tuple[int, str]  # of each thread
    operations: int  # of each thread in one pass
    passes: int  # of one call, which takes about half a millisecond: not interrupted often, nor is its start felt


def peaks(level: Level) -> dict[str, Peak]:
    """The peaks of a level, by their names: float32 and, as far as it has them, dot products and AMX."""
    found = [_float32(level)]
    if (dot := level.dots.get("int8")) is not None:
        found.append(_dot_peak(level, dot))
    if (words := level.words.get("int8")) is not None:
        found.append(_word_peak(level, words))
    if (pairs := level.pair_dots.get("bfloat16")) is not None:
        found.append(_pair_peak(level, pairs))
    if level.amx_rows is not None:
        found.append(_amx_peak(AMX, multiply_tiles, "int32", 1))
    if level.pair_tiles:
        found.append(_amx_peak(AMX_PAIRS, multiply_bfloat16_tiles, "float32", 2))
    return {peak.name: peak for peak in found}


def peak_of(level: Level, stored: Storage, rows: int) -> tuple[str, int]:
    """The name of the peak that limits a product of so many rows, and how often it does each multiplication."""
    rounding = stored.rounding
    if rounding in level.dots and level.amx_rows is not None and rows >= level.amx_rows:
        return AMX, level.dots[rounding].planes
    if rounding in level.words and format_of(stored).words:
        return WORDS, level.words[rounding].planes
    if rounding in level.dots:
        return INT8, level.dots[rounding].planes
    if rounding == "bfloat16" and level.pair_tiles:
        return AMX_PAIRS, 1
    return (PAIRS if rounding in level.pair_dots else FLOAT32), 1


def _float32(level: Level) -> Peak:
    lanes = level.lanes

    def make(threads: int, passes: int) -> PrimFunc:
        return multiply_add(level, threads, passes * DEPTH)

    return Peak(FLOAT32, make, ((2 * lanes, "float32"),), (lanes, "float32"), 2 * DEPTH * CHAINS * lanes, passes=4096)


def multiply_add(level: Level, threads: int, steps: int) -> PrimFunc:
    """Kernel from factors (2 * lanes,) float32 to out (threads * lanes,): chains of multiply-adds.

    Each thread computes x = x * a + b `steps` times in each of `CHAINS` registers.
    """
    lanes = level.lanes
    join = _join(lanes, CHAINS)

    @T.prim_func
    def kernel(factors: T.Buffer((2 * lanes,), "float32"), out: T.Buffer((threads * lanes,), "float32")):
        T.func_attr({"tirx.noalias": True})
        for thread in T.parallel(threads):
            sums = T.alloc_buffer((CHAINS * lanes,), "float32")
            for i in T.unroll(CHAINS):
                for v in T.vectorized(lanes):
                    sums[i * lanes + v] = factors[v] + T.Cast("float32", i)
            for _ in T.serial(steps):
                for i in T.unroll(CHAINS):
                    for v in T.vectorized(lanes):
                        sums[i * lanes + v] = sums[i * lanes + v] * factors[v] + factors[lanes + v]
            join(sums, out, thread)

    return kernel


@dataclass(frozen=True)
class _Multiply:
    """Instructions that add the products of a vector of weights and some numbers of x to a vector of sums."""

    sums: tuple[int, str]  # lanes and dtype
    weights: tuple[int, str]
    x_dtype: str
    products: int  # in one call of `add`
    add: Callable[..., Any]  # from sums, weights, x and an index of x to the sums
    ir: str = ""  # LLVM IR that `add` needs


def _dot_peak(level: Level, dot: Dot) -> Peak:
    found = _Multiply((dot.lanes, "int32"), (dot.vector, dot.slab_dtype), dot.x_dtype, dot.vector, dot.add)
    return _tile_peak(INT8, level, found)


def _word_peak(level: Level, words: WordDot) -> Peak:
    lanes = words.lanes
    found = _Multiply((2 * lanes, "int16"), (lanes, "int32"), "int8", lanes * DOT, words.add)
    return _tile_peak(WORDS, level, found)


def _pair_peak(level: Level, pairs: PairDot) -> Peak:
    lanes = pairs.lanes
    found = _Multiply(
        *((lanes, "float32"), (lanes, "uint32"), "uint32", 2 * lanes),
        add=lambda sums, weights, x, at: pairs.add(sums, weights, x[at]),
        ir=pairs.ir,
    )
    return _tile_peak(PAIRS, level, found)


def _amx_peak(name: str, multiply: Callable[..., Any], dtype: str, itemsize: int) -> Peak:
    """Peak of a product of tiles, whose numbers have so many bytes."""

    def make(threads: int, passes: int) -> PrimFunc:
        return multiply_again(multiply, dtype, threads, passes * DEPTH)

    operations = 2 * DEPTH * PRODUCTS * TILE_SUMS * (TILE_BYTES // itemsize)
    return Peak(name, make, ((2 * TILE, "int8"),), (TILE_SUMS, dtype), operations, passes=128)


def _tile_peak(name: str, level: Level, by: _Multiply) -> Peak:
    """Peak of a tile of sums in registers, whose operands come from the L1 cache."""
    rows, vectors = level.tile.rows, level.tile.columns // level.lanes
    sizes = ((DEPTH * vectors * by.weights[0], by.weights[1]), (DEPTH * rows * DOT, by.x_dtype))

    def make(threads: int, passes: int) -> PrimFunc:
        return _tile(by, rows, vectors, threads, passes)

    return Peak(name, make, sizes, by.sums, 2 * DEPTH * rows * vectors * by.products, passes=1024)


def _tile(by: _Multiply, rows: int, vectors: int, threads: int, passes: int) -> PrimFunc:
    (lanes, dtype), (vector, weights_dtype), products = by.sums, by.weights, rows * vectors
    join = _join(lanes, products)

    @T.prim_func
    def kernel(
        w: T.Buffer((DEPTH * vectors * vector,), weights_dtype),
        x: T.Buffer((DEPTH * rows * DOT,), by.x_dtype),
        out: T.Buffer((threads * lanes,), dtype),
    ):
        T.func_attr({"tirx.noalias": True})
        with T.attr(0, "pragma_import_llvm", by.ir):
            for thread in T.parallel(threads):
                sums = T.alloc_buffer((products * lanes,), dtype)
                for i in T.unroll(products):
                    for v in T.vectorized(lanes):
                        sums[i * lanes + v] = T.Cast(dtype, i)
                for _ in T.serial(passes):
                    for d in T.serial(DEPTH):
                        for r in T.unroll(rows):
                            for i in T.unroll(vectors):
                                sums[T.ramp((r * vectors + i) * lanes, 1, lanes)] = by.add(
                                    sums[T.ramp((r * vectors + i) * lanes, 1, lanes)],
                                    w[T.ramp((d * vectors + i) * vector, 1, vector)],
                                    x,
                                    (d * rows + r) * DOT,
                                )
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
