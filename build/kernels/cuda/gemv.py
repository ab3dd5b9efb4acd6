"""One row times a matrix: y = x W^T, with an RMSNorm of x in front and SwiGLU and the residual behind, in one launch.

A block is a panel of 32 outputs (with SwiGLU those of gate and of up), its warps share K, each lane sums its output in float32, and the warps'
sums meet in shared memory. A small N has few panels: then a block has more warps (the split of K), until there are as many as keep every
multiprocessor's loads on their way. A norm is computed by every block anew, which costs a read of x from the second-level cache and saves a launch:
x times the gain waits in shared memory, and the sums are divided by the root of the mean square in the end.

Bytes per call: the weights, N K itemsize, each read once. Operations: 2 N K.
"""

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda.binding import SHARED_BYTES, WARP, Binding
from build.kernels.cuda.norm import inverse_rms, sum_squares
from build.kernels.cuda.swiglu import gated
from build.kernels.cuda.weights import factor, group_of
from build.kernels.shapes import Linear
from build.layout import PANEL, vector_layout, vector_steps
from export.quantize import INT4_ZERO, MatrixFormat

# Not yet measured on a GPU. 4.8 TB/s for about 700 ns are 3.4 MB on their way; 2048 warps with 4 loads of 512 bytes are 4.2.
WARPS = (8, 16, 32)  # in a block
ALL_WARPS = 2048
LOADS = 4  # of 16 bytes, that a thread starts before it needs the first
INT4_LOADS = 2  # where 16 bytes are 32 steps, whose x takes as many registers; with 4 of them sm_80 spills
FLOATS = 4  # of x, in 16 bytes


def gemv_warps(panels: int, vectors: int) -> int:
    """Warps of a block: as few as make `ALL_WARPS` of all blocks, and not more than have something to load."""
    return next(warps for warps in WARPS if panels * warps >= ALL_WARPS or 2 * warps > vectors or warps == WARPS[-1])


def fits_norm(shape: Linear) -> bool:
    """Whether a block has room for a normed x, beside the sums of at most 32 warps, twice, and what `vector_sums` takes."""
    sums = 4 * (2 * WARPS[-1] * PANEL + WARPS[-1] * WARP + WARP)
    if shape.weight.dtype == "int4":
        sums += 4 * (shape.k // FLOATS + vectors_of(shape.weight, shape.k))
    return 4 * shape.k + sums <= SHARED_BYTES


def gemv(shape: Linear, on: Binding):
    """Body of `linear` for one row; a norm must fit (`fits_norm`)."""
    n, k, n_out, stored = shape.n, shape.k, shape.n_out, shape.weight
    panels, halves = -(-n_out // PANEL), n // n_out
    warps = gemv_warps(panels, vectors_of(stored, k))
    threads, row, int4 = warps * WARP, shape.x_row(0), stored.dtype == "int4"
    (hold, dot), total = panel_dot(stored, k, warps, on), panel_total(stored, warps)
    add_up, sizes, layout = vector_sums(stored, k, threads, on), held_sizes(stored, k), vector_layout(stored, n, k)
    measure, inverse = sum_squares(k, threads, on), inverse_rms(k, shape.norm_eps or 0.0)  # of use where there is a norm

    def output(partial, sums, s, residual, p, lane):
        column = p * PANEL + lane
        scaled = T.float32(1) if sums is None else inverse(sums)
        found = total(partial, 0, s, column, lane) * scaled
        if shape.swiglu:
            found = gated(found, total(partial, warps, s, n_out + column, lane) * scaled)
        return found if residual is None else residual[0, column] + found

    @T.inline
    def multiply(x, i, w, s, z, p, held, partial):
        x_sums = T.alloc_buffer((vectors_of(stored, k) if int4 else 1,), "float32", scope=on.shared)
        quarters = T.alloc_buffer((k // FLOATS if int4 else 1,), "float32", scope=on.shared)
        if int4:
            add_up(x, i, quarters, x_sums)
        dot(x, i, w, s, z, x_sums, p, held, partial, 0)
        if shape.swiglu:
            hold(w, s, z, panels + p, held)
            dot(x, i, w, s, z, x_sums, panels + p, held, partial, warps)

    @T.inline
    def store(partial, sums, s, residual, y, p):
        for t in on.threads(threads):
            if t < PANEL and p * PANEL + t < n_out:
                y[0, p * PANEL + t] = output(partial, sums, s, residual, p, t)

    @T.inline
    def plain(x, w, s, z, residual, y, p, held, partial):
        hold(w, s, z, p, held)
        multiply(x, row, w, s, z, p, held, partial)
        store(partial, None, s, residual, y, p)

    @T.inline
    def normed(x, gain, w, s, z, residual, y, p, held, partial):
        gained = T.alloc_buffer((1, k), "float32", scope=on.shared)
        squares = T.alloc_buffer((threads,), "float32", scope=on.shared)
        sums = T.alloc_buffer((WARP,), "float32", scope=on.shared)
        hold(w, s, z, p, held)  # first, so that it is on its way during the norm
        for t in on.threads(threads):
            for c in T.serial(-(-k // threads)):
                if c * threads + t < k:
                    gained[0, c * threads + t] = x[row, c * threads + t] * gain[c * threads + t]
        measure(x, row, squares, sums)
        multiply(gained, 0, w, s, z, p, held, partial)
        store(partial, sums, s, residual, y, p)

    @T.inline
    def body(x, gain, w, s, z, residual, y):
        for p in on.blocks(panels):
            partial = T.alloc_buffer((halves * warps, PANEL), "float32", scope=on.shared)
            words = T.alloc_buffer((on.copies(threads) * sizes[0],), layout.dtype, scope=on.private)
            scales = T.alloc_buffer((on.copies(threads) * sizes[1],), "float16", scope=on.private)
            zeros = T.alloc_buffer((on.copies(threads) * sizes[2],), "uint8", scope=on.private)
            if shape.norm_eps is None:
                plain(x, w, s, z, residual, y, p, Held(words, scales, zeros), partial)
            else:
                normed(x, gain, w, s, z, residual, y, p, Held(words, scales, zeros), partial)

    return body


def panel_total(stored: MatrixFormat, warps: int):
    """`total(partial, first, s, row, lane)`: one output's sums by `warps` warps from `first` on, one by one, times its scale; a TIR expression."""

    def total(partial: Any, first: int, s: Any, row: Any, lane: Any) -> Any:
        found = partial[first, lane]
        for warp in range(first + 1, first + warps):
            found = found + partial[warp, lane]
        return found if s is None or stored.dtype != "int8" else found * s[row]

    return total


@dataclass(frozen=True)
class Held:
    """What a thread has loaded of a panel and not yet used: for each of some vectors its words and, of int4, its group's scale and zero point."""

    words: Any
    scales: Any
    zeros: Any


def vectors_of(stored: MatrixFormat, k: int) -> int:
    """Vectors of 16 bytes in one output's K."""
    return -(-k // vector_steps(stored))


def vector_sums(stored: MatrixFormat, k: int, threads: int, on: Binding):
    """Inline `add_up(x, i, quarters, x_sums)`: x_sums[v] = the sum of row i of x over the steps of vector v, for int4.

    By way of `quarters`, the sums of four numbers, so that neighbouring threads read neighbouring ones.
    """
    each = vector_steps(stored) // FLOATS  # quarters of a vector

    @T.inline
    def add_up(x_in, i, quarters, x_sums):
        x = T.decl_buffer((x_in.shape[0], k // FLOATS, FLOATS), "float32", data=x_in.data, scope=x_in.scope())
        for t in on.threads(threads):
            for c in T.serial(-(-k // FLOATS // threads)):
                if c * threads + t < k // FLOATS:
                    some = T.alloc_buffer((FLOATS,), "float32", scope=on.private)
                    for v in T.vectorized(FLOATS):
                        some[v] = x[i, c * threads + t, v]
                    quarters[c * threads + t] = (some[0] + some[1]) + (some[2] + some[3])
        for t in on.threads(threads):
            for c in T.serial(-(-vectors_of(stored, k) // threads)):
                if c * threads + t < vectors_of(stored, k):
                    total = T.alloc_buffer((1,), "float32", scope=on.private)
                    total[0] = T.float32(0)
                    for v in T.serial(each):
                        if (c * threads + t) * each + v < k // FLOATS:
                            total[0] = total[0] + quarters[(c * threads + t) * each + v]
                    x_sums[c * threads + t] = total[0]

    return add_up


def panel_dot(stored: MatrixFormat, k: int, warps: int, on: Binding):
    """Inlines `hold(w, s, z, p, held)`, which starts the first loads, and `dot(x, i, w, s, z, x_sums, p, held, partial, first)`.

    After both, partial[first + warp, lane] is this warp's share of row `i` of x times panel `p` of w; `x_sums` are those of `vector_sums`. A scale
    per output is left to the caller; scales of groups are multiplied in.
    """
    steps, vectors = vector_steps(stored), vectors_of(stored, k)
    words, loads, int4 = vector_layout(stored, PANEL, k).shape[-1], _loads(stored), stored.dtype == "int4"
    turns = vectors // (warps * loads)  # in which no warp lacks a vector
    begun = turns * warps * loads
    whole = k % steps == 0 and k % FLOATS == 0
    read = factor(stored)
    threads = warps * WARP

    @T.inline
    def load(w, s, z, p, at, lane, held, u):
        for v in T.vectorized(words):
            held.words[u * words + v] = w[p, at, lane, v]
        if int4:
            held.scales[u] = s[p, group_of(stored, at), lane]
            if stored.zero_points:
                held.zeros[u] = z[p, group_of(stored, at), lane]

    @T.inline
    def load_turn(w, s, z, p, turn, held, t):
        for u in on.unroll(loads):
            load(w, s, z, p, (turn * loads + u) * warps + t // WARP, t % WARP, held, on.own(t) * loads + u)

    @T.inline
    def multiply(x, i, x_sums, at, held, u, acc):
        """acc += the vector that is held at u times its steps of x."""
        total = T.alloc_buffer((1,), "float32", scope=on.private)
        total[0] = T.float32(0)
        if whole:
            for c in on.unroll(steps // FLOATS):
                some = T.alloc_buffer((FLOATS,), "float32", scope=on.private)
                for v in T.vectorized(FLOATS):
                    some[v] = x[i, at * steps + c * FLOATS + v]
                for v in on.unroll(FLOATS):
                    total[0] = total[0] + some[v] * read(held.words, u * words, c * FLOATS + v)
        else:
            for v in on.unroll(steps):
                total[0] = total[0] + T.if_then_else(at * steps + v < k, x[i, at * steps + v], T.float32(0)) * read(held.words, u * words, v)
        if int4:
            zero = T.float32(16) + (T.Cast("float32", held.zeros[u]) if stored.zero_points else T.float32(INT4_ZERO))
            acc[0] = acc[0] + (T.float32(16) * total[0] - zero * x_sums[at]) * T.Cast("float32", held.scales[u])
        else:
            acc[0] = acc[0] + total[0]

    @T.inline
    def hold(w, s, z, p, held):
        if turns > 0:
            for t in on.threads(threads):
                load_turn(w, s, z, p, 0, held, t)

    @T.inline
    def dot(x, i, w, s, z, x_sums, p, held, partial, first):
        for t in on.threads(threads):
            acc = T.alloc_buffer((1,), "float32", scope=on.private)
            acc[0] = T.float32(0)
            for turn in T.serial(turns):
                if turn > 0:
                    load_turn(w, s, z, p, turn, held, t)
                for u in on.unroll(loads):
                    multiply(x, i, x_sums, (turn * loads + u) * warps + t // WARP, held, on.own(t) * loads + u, acc)
            for turn in T.serial(-(-(vectors - begun) // warps)):
                if begun + turn * warps + t // WARP < vectors:
                    load(w, s, z, p, begun + turn * warps + t // WARP, t % WARP, held, on.own(t) * loads)
                    multiply(x, i, x_sums, begun + turn * warps + t // WARP, held, on.own(t) * loads, acc)
            partial[first + t // WARP, t % WARP] = acc[0]

    return hold, dot


def _loads(stored: MatrixFormat) -> int:
    """Of 16 bytes, that a thread starts before it needs the first."""
    return INT4_LOADS if stored.dtype == "int4" else LOADS


def held_sizes(stored: MatrixFormat, k: int) -> tuple[int, int, int]:
    """Numbers of `Held` for a thread: words, scales, zero points; those that a format lacks take one place."""
    loads, int4 = _loads(stored), stored.dtype == "int4"
    return loads * vector_layout(stored, PANEL, k).shape[-1], loads if int4 else 1, loads if stored.zero_points else 1
