"""One row times a matrix: y = x W^T, with RMSNorm of x in front and SwiGLU and the residual behind, in one launch.

A block computes a panel of 32 outputs (with SwiGLU, a panel of gate and one of up). Its warps share K, each lane sums
its output in float32, and the warps' sums are added up in shared memory. A small N has few panels: then each block
has more warps (split K), until there are enough to keep every multiprocessor's loads in flight. Every block computes
the norm again, which costs a read of x from the second-level (L2) cache and saves a launch: x times the gain waits in
shared memory, and the sums are divided by the root mean square at the end. Likewise, every block takes the columns of
x in the order of a weight's columns. Without either, x waits there too, in parts if it has no room: a multiprocessor
gives answers in the order of the loads, so x from memory would come after the weights asked for before.

Bytes per call: the weights, N * K * itemsize, each read once. Operations: 2 * N * K.
"""

from tvm.script import tirx as T

from build.kernels.cuda.binding import SHARED_BYTES, WARP, Binding
from build.kernels.cuda.norm import inverse_rms, sum_squares
from build.kernels.cuda.panel_dot import (
    Held,
    equal_parts,
    held_sizes,
    panel_dot,
    panel_total,
    quarters_of,
    vector_sums,
    vectors_of,
)
from build.kernels.cuda.swiglu import gated
from build.kernels.cuda.weights import Loading, needs_sums, parts_of
from build.kernels.shapes import Linear
from export.weights.table import vector_layout
from runtime.artifact.layouts import PANEL

# 4.8 TB/s for about 700 ns are 3.4 MB in flight; 2048 warps with 4 loads of 512 bytes are 4.2 MB.
WARPS = (8, 16, 32)  # per block
ALL_WARPS = 2048


def gemv_warps(panels: int, vectors: int) -> int:
    """Warps per block: the fewest that make `ALL_WARPS` over all blocks, but no more than have something to load."""
    return next(warps for warps in WARPS if panels * warps >= ALL_WARPS or 2 * warps > vectors or warps == WARPS[-1])


def prepares_x(shape: Linear) -> bool:
    """Whether a product takes x times a norm's gain, or in another order."""
    return shape.norm_eps is not None or shape.weight.reordered


def fits(shape: Linear) -> bool:
    """Whether a block has room for a prepared x and what `vector_sums` needs, besides twice the sums of 32 warps."""
    return _room(shape) >= (shape.k if prepares_x(shape) else 0)


def _room(shape: Linear) -> int:
    """Numbers of x that a block has room for."""
    floats = 2 * WARPS[-1] * PANEL + WARPS[-1] * WARP + WARP
    if needs_sums(shape.weight):
        floats += quarters_of(shape.k) + vectors_of(shape.weight, shape.k)
    return SHARED_BYTES // 4 - floats


def gemv(shape: Linear, on: Binding):
    """Body of `linear` for one row that `fits`."""
    n, k, n_out, stored = shape.n, shape.k, shape.n_out, shape.weight
    panels, halves = -(-n_out // PANEL), n // n_out
    warps = gemv_warps(panels, vectors_of(stored, k))
    threads, corrected = warps * WARP, needs_sums(stored)
    (hold, dot), total = panel_dot(stored, k, warps, on), panel_total(stored, warps)
    add_up, sizes, layout = vector_sums(stored, k, threads, on), held_sizes(stored), vector_layout(stored, n, k)
    dtypes = [Loading.of(stored).dtype, *(parts_of(layout)[name][1] for name in ("s", "z"))]
    parts = None if prepares_x(shape) or shape.swiglu else equal_parts(stored, k, warps, _room(shape))
    dot_part = panel_dot(stored, k, warps, on, parts)[1]
    # Used only where there is a norm.
    measure, inverse = sum_squares(k, threads, on), inverse_rms(k, shape.norm_eps or 0.0)

    def output(partial, sums, s, residual, p, lane):
        column = p * PANEL + lane
        scaled = T.float32(1) if sums is None else inverse(sums)
        found = total(partial, 0, s, column, lane) * scaled
        if shape.swiglu:
            found = gated(found, total(partial, warps, s, n_out + column, lane) * scaled)
        return found if residual is None else residual[0, column] + found

    @T.inline
    def multiply(x, i, w, s, z, p, held, partial):
        x_sums = T.alloc_buffer((vectors_of(stored, k) if corrected else 1,), "float32", scope=on.shared)
        quarters = T.alloc_buffer((quarters_of(k) if corrected else 1,), "float32", scope=on.shared)
        if corrected:
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
    def take_part(x, part, some):
        for t in on.threads(threads):
            for c in T.serial(-(-k // (parts or 1) // threads)):
                if c * threads + t < k // (parts or 1):
                    some[0, c * threads + t] = x[0, part * (k // (parts or 1)) + c * threads + t]

    def parts_from(part):
        """Inline for a part and those after it; TVM's analysis of regions fails at a loop over them."""
        following = parts_from(part + 1) if part + 1 < parts else None

        @T.inline
        def step(x, w, s, z, x_sums, p, held, some, acc):
            take_part(x, part, some)
            dot_part(some, part, w, s, z, x_sums, p, held, acc)
            if following is not None:
                following(x, w, s, z, x_sums, p, held, some, acc)

        return step

    all_parts = parts_from(0) if parts else None

    @T.inline
    def in_parts(x, w, s, z, residual, y, p, held, partial):
        """Without a norm or an order: x goes through shared memory in parts, as large as fit."""
        some = T.alloc_buffer((1, k // (parts or 1)), "float32", scope=on.shared)
        x_sums = T.alloc_buffer((vectors_of(stored, k) if corrected else 1,), "float32", scope=on.shared)
        quarters = T.alloc_buffer((quarters_of(k) if corrected else 1,), "float32", scope=on.shared)
        acc = T.alloc_buffer((on.copies(threads),), "float32", scope=on.private)
        hold(w, s, z, p, held)
        if corrected:
            add_up(x, 0, quarters, x_sums)
        for t in on.threads(threads):
            acc[on.own(t)] = T.float32(0)
        all_parts(x, w, s, z, x_sums, p, held, some, acc)
        for t in on.threads(threads):
            partial[t // WARP, t % WARP] = acc[on.own(t)]
        store(partial, None, s, residual, y, p)

    @T.inline
    def plain(x, w, s, z, residual, y, p, held, partial):
        hold(w, s, z, p, held)
        multiply(x, 0, w, s, z, p, held, partial)
        store(partial, None, s, residual, y, p)

    def prepared_x(x, gain, order, c):
        column = order[c] if stored.reordered else c
        return x[0, column] if gain is None else x[0, column] * gain[column]

    @T.inline
    def prepare(x, gain, order, prepared):
        for t in on.threads(threads):
            for c in T.serial(-(-k // threads)):
                if c * threads + t < k:
                    prepared[0, c * threads + t] = prepared_x(x, gain, order, c * threads + t)

    @T.inline
    def reordered(x, w, s, z, order, residual, y, p, held, partial):
        prepared = T.alloc_buffer((1, k), "float32", scope=on.shared)
        hold(w, s, z, p, held)
        prepare(x, None, order, prepared)
        multiply(prepared, 0, w, s, z, p, held, partial)
        store(partial, None, s, residual, y, p)

    @T.inline
    def normed(x, gain, w, s, z, order, residual, y, p, held, partial):
        prepared = T.alloc_buffer((1, k), "float32", scope=on.shared)
        squares = T.alloc_buffer((threads,), "float32", scope=on.shared)
        sums = T.alloc_buffer((WARP,), "float32", scope=on.shared)
        hold(w, s, z, p, held)  # first, so that its loads are in flight during the norm
        prepare(x, gain, order, prepared)
        measure(x, 0, squares, sums)
        multiply(prepared, 0, w, s, z, p, held, partial)
        store(partial, sums, s, residual, y, p)

    @T.inline
    def body(x, gain, w, s, z, order, residual, y):
        for p in on.blocks(panels):
            partial = T.alloc_buffer((halves * warps, PANEL), "float32", scope=on.shared)
            elements = T.alloc_buffer((on.copies(threads) * sizes[0],), dtypes[0], scope=on.private)
            scales = T.alloc_buffer((on.copies(threads) * sizes[1],), dtypes[1], scope=on.private)
            offsets = T.alloc_buffer((on.copies(threads) * sizes[2],), dtypes[2], scope=on.private)
            if shape.norm_eps is not None:
                normed(x, gain, w, s, z, order, residual, y, p, Held(elements, scales, offsets), partial)
            elif stored.reordered or (parts is None and k <= _room(shape)):
                reordered(x, w, s, z, order, residual, y, p, Held(elements, scales, offsets), partial)
            elif parts is not None:
                in_parts(x, w, s, z, residual, y, p, Held(elements, scales, offsets), partial)
            else:
                plain(x, w, s, z, residual, y, p, Held(elements, scales, offsets), partial)

    return body
