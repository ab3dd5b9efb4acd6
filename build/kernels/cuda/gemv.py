"""One row times a matrix: y = x W^T, with an RMSNorm of x in front and SwiGLU and the residual behind, in one launch.

A block is a panel of 32 outputs (with SwiGLU those of gate and of up), its warps share K, each lane sums its output in float32, and the warps'
sums meet in shared memory. A small N has few panels: then a block has more warps (the split of K), until there are as many as keep every
multiprocessor's loads on their way. A norm is computed by every block anew, which costs a read of x from the second-level cache and saves a launch:
x times the gain waits in shared memory, and the sums are divided by the root of the mean square in the end.

Bytes per call: the weights, N K itemsize, each read once. Operations: 2 N K.
"""

from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda.binding import SHARED_BYTES, WARP, Binding
from build.kernels.cuda.norm import inverse_rms, sum_squares
from build.kernels.cuda.swiglu import gated
from build.kernels.cuda.weights import factor, group_of, scale_of, zero_of
from build.kernels.shapes import Linear
from build.layout import PANEL, vector_layout, vector_steps
from export.quantize import MatrixFormat

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
    """Whether a block has room for a normed x: what else it shares takes at most the sums of 32 warps, twice, and one sum for each vector of x."""
    sums = 4 * (2 * WARPS[-1] * PANEL + WARPS[-1] * WARP + WARP) + 4 * -(-shape.k // vector_steps(shape.weight))
    return 4 * shape.k + sums <= SHARED_BYTES


def gemv(shape: Linear, on: Binding):
    """Body of `linear` for one row; a norm must fit (`fits_norm`)."""
    n, k, n_out, stored = shape.n, shape.k, shape.n_out, shape.weight
    panels = -(-n_out // PANEL)
    warps = gemv_warps(panels, -(-k // vector_steps(stored)))
    threads, row = warps * WARP, shape.x_row(0)
    dot, total = panel_dot(stored, k, warps, on), panel_total(stored, warps)
    measure, inverse = sum_squares(k, threads, on), inverse_rms(k, shape.norm_eps or 0.0)  # of use where there is a norm

    def output(partial, sums, s, residual, p, lane):
        column = p * PANEL + lane
        scaled = T.float32(1) if sums is None else inverse(sums)
        found = total(partial, 0, s, column, lane) * scaled
        if shape.swiglu:
            found = gated(found, total(partial, warps, s, n_out + column, lane) * scaled)
        return found if residual is None else residual[0, column] + found

    @T.inline
    def multiply(x, i, w, s, z, p, partial):
        dot(x, i, w, s, z, p, partial, 0)
        if shape.swiglu:
            dot(x, i, w, s, z, panels + p, partial, warps)

    @T.inline
    def store(partial, sums, s, residual, y, p):
        for t in on.threads(threads):
            if t < PANEL and p * PANEL + t < n_out:
                y[0, p * PANEL + t] = output(partial, sums, s, residual, p, t)

    @T.inline
    def plain(x, _gain, w, s, z, residual, y):
        for p in on.blocks(panels):
            partial = T.alloc_buffer((n // n_out * warps, PANEL), "float32", scope=on.shared)
            multiply(x, row, w, s, z, p, partial)
            store(partial, None, s, residual, y, p)

    @T.inline
    def normed(x, gain, w, s, z, residual, y):
        for p in on.blocks(panels):
            partial = T.alloc_buffer((n // n_out * warps, PANEL), "float32", scope=on.shared)
            gained = T.alloc_buffer((1, k), "float32", scope=on.shared)
            squares = T.alloc_buffer((threads,), "float32", scope=on.shared)
            sums = T.alloc_buffer((WARP,), "float32", scope=on.shared)
            for t in on.threads(threads):
                for c in T.serial(-(-k // threads)):
                    if c * threads + t < k:
                        gained[0, c * threads + t] = x[row, c * threads + t] * gain[c * threads + t]
            measure(x, row, squares, sums)
            multiply(gained, 0, w, s, z, p, partial)
            store(partial, sums, s, residual, y, p)

    return plain if shape.norm_eps is None else normed


def panel_total(stored: MatrixFormat, warps: int):
    """`total(partial, first, s, row, lane)`: one output's sums by `warps` warps from `first` on, one by one, times its scale; a TIR expression."""

    def total(partial: Any, first: int, s: Any, row: Any, lane: Any) -> Any:
        found = partial[first, lane]
        for warp in range(first + 1, first + warps):
            found = found + partial[warp, lane]
        return found if s is None or stored.dtype != "int8" else found * s[row]

    return total


def panel_dot(stored: MatrixFormat, k: int, warps: int, on: Binding):
    """Inline `dot(x, i, w, s, z, p, partial, first)`: partial[first + warp, lane] = this warp's share of row `i` of x times panel `p` of w.

    A scale per output is left to the caller; scales of groups are multiplied in.
    """
    steps = vector_steps(stored)
    vectors = -(-k // steps)
    layout = vector_layout(stored, PANEL, k)
    words = layout.shape[-1]
    loads = INT4_LOADS if stored.dtype == "int4" else LOADS
    turns = vectors // (warps * loads)  # in which no warp lacks a vector
    begun = turns * warps * loads
    whole = k % steps == 0 and k % FLOATS == 0
    read, int4 = factor(stored), stored.dtype == "int4"
    threads = warps * WARP

    @T.inline
    def sum_groups(x, i, x_sums):
        """x_sums[v] = the sum of x over the steps of vector v."""
        for t in on.threads(threads):
            for c in T.serial(-(-vectors // threads)):
                if c * threads + t < vectors:
                    total = T.alloc_buffer((1,), "float32", scope=on.private)
                    total[0] = T.float32(0)
                    for v in T.serial(steps):
                        if (c * threads + t) * steps + v < k:
                            total[0] = total[0] + x[i, (c * threads + t) * steps + v]
                    x_sums[c * threads + t] = total[0]

    @T.inline
    def load(w, p, at, lane, loaded, start):
        for v in T.vectorized(words):
            loaded[start + v] = w[p, at, lane, v]

    @T.inline
    def multiply(x, i, s, z, x_sums, p, at, lane, loaded, start, acc):
        """acc += the vector at loaded[start :] times its steps of x."""
        total = T.alloc_buffer((1,), "float32", scope=on.private)
        total[0] = T.float32(0)
        if whole:
            for c in on.unroll(steps // FLOATS):
                some = T.alloc_buffer((FLOATS,), "float32", scope=on.private)
                for v in T.vectorized(FLOATS):
                    some[v] = x[i, at * steps + c * FLOATS + v]
                for v in on.unroll(FLOATS):
                    total[0] = total[0] + some[v] * read(loaded, start, c * FLOATS + v)
        else:
            for v in on.unroll(steps):
                total[0] = total[0] + T.if_then_else(at * steps + v < k, x[i, at * steps + v], T.float32(0)) * read(loaded, start, v)
        if int4:
            g = group_of(stored, at)
            acc[0] = acc[0] + (T.float32(16) * total[0] - (T.float32(16) + zero_of(stored, z, p, g, lane)) * x_sums[at]) * scale_of(s, p, g, lane)
        else:
            acc[0] = acc[0] + total[0]

    @T.inline
    def dot(x, i, w, s, z, p, partial, first):
        x_sums = T.alloc_buffer((vectors if int4 else 1,), "float32", scope=on.shared)
        if int4:
            sum_groups(x, i, x_sums)
        for t in on.threads(threads):
            acc = T.alloc_buffer((1,), "float32", scope=on.private)
            acc[0] = T.float32(0)
            for turn in T.serial(turns):
                loaded = T.alloc_buffer((loads * words,), layout.dtype, scope=on.private)
                for u in on.unroll(loads):
                    load(w, p, (turn * loads + u) * warps + t // WARP, t % WARP, loaded, u * words)
                for u in on.unroll(loads):
                    multiply(x, i, s, z, x_sums, p, (turn * loads + u) * warps + t // WARP, t % WARP, loaded, u * words, acc)
            for turn in T.serial(-(-(vectors - begun) // warps)):
                at = begun + turn * warps + t // WARP
                if at < vectors:
                    last = T.alloc_buffer((words,), layout.dtype, scope=on.private)
                    load(w, p, at, t % WARP, last, 0)
                    multiply(x, i, s, z, x_sums, p, at, t % WARP, last, 0, acc)
            partial[first + t // WARP, t % WARP] = acc[0]

    return dot
