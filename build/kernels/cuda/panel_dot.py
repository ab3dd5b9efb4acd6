"""One row times panels of a packed matrix, shared among the lanes of a block: the core of `gemv.py` and of a mixture.

Each lane has one output of the panel, and the warps share K, 16 bytes of each output at a time. Several loads start
before the first is needed: those of a turn together, and the very first ahead of everything, so that memory is busy
while a block prepares x.
"""

from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda.binding import WARP, Binding
from build.kernels.cuda.weights import Loading, factor, group_of, group_scaling, needs_sums, row_scale
from export.weights.format import Storage
from export.weights.table import format_of, scaled_by_rows, vector_steps

LOADS = 4  # 16-byte loads that a thread starts before it needs the first
GROUP_LOADS = 3  # where a scale is loaded with each; with 4 loads, sm_100 spills
WORD_LOADS = 2  # where 16 bytes are 32 steps, whose x takes as many registers; with 4 loads, sm_80 spills
FLOATS = 4  # numbers of x in 16 bytes


@dataclass(frozen=True)
class Held:
    """Parts of a panel that a thread has loaded and not yet used.

    For each of several vectors: its elements and, where there are groups, the scale and the offset of its group.
    """

    elements: Any
    scales: Any
    offsets: Any


def vectors_of(stored: Storage, k: int) -> int:
    """Number of 16-byte vectors in one output's K."""
    return -(-k // vector_steps(stored))


def quarters_of(k: int) -> int:
    """Number of sums of four numbers in a row of x."""
    return -(-k // FLOATS)


def vector_sums(stored: Storage, k: int, threads: int, on: Binding):
    """Inline `add_up(x, i, quarters, x_sums)`: x_sums[v] = the sum of row i of x over the steps of vector v.

    It goes through `quarters`, the sums of four numbers, so that neighbouring threads read neighbouring numbers.
    """
    each, count = vector_steps(stored) // FLOATS, quarters_of(k)

    @T.inline
    def load(x, i, at, some):
        if k % FLOATS == 0:
            for v in T.vectorized(FLOATS):
                some[v] = x[i, at * FLOATS + v]
        else:
            for v in on.unroll(FLOATS):
                some[v] = T.if_then_else(at * FLOATS + v < k, x[i, at * FLOATS + v], T.float32(0))

    @T.inline
    def add_up(x, i, quarters, x_sums):
        for t in on.threads(threads):
            for c in T.serial(-(-count // threads)):
                if c * threads + t < count:
                    some = T.alloc_buffer((FLOATS,), "float32", scope=on.private)
                    load(x, i, c * threads + t, some)
                    quarters[c * threads + t] = (some[0] + some[1]) + (some[2] + some[3])
        for t in on.threads(threads):
            for c in T.serial(-(-vectors_of(stored, k) // threads)):
                if c * threads + t < vectors_of(stored, k):
                    total = T.alloc_buffer((1,), "float32", scope=on.private)
                    total[0] = T.float32(0)
                    for v in T.serial(each):
                        if (c * threads + t) * each + v < count:
                            total[0] = total[0] + quarters[(c * threads + t) * each + v]
                    x_sums[c * threads + t] = total[0]

    return add_up


def panel_dot(stored: Storage, k: int, warps: int, on: Binding, parts: int | None = None):
    """Inlines `hold(w, s, z, p, held)` and `dot(x, i, w, s, z, x_sums, p, held, partial, first)`.

    `hold` starts the first loads. After both, partial[first + warp, lane] is this warp's share of row `i` of x times
    panel `p` of w; `x_sums` come from `vector_sums`. A scale per output is left to the caller; group scales are
    multiplied in.
    """
    steps, vectors = vector_steps(stored), vectors_of(stored, k)
    elements, loads, grouped = Loading.of(stored).elements, _loads(stored), stored.grouped
    turns = vectors // (warps * loads)  # turns in which no warp lacks a vector
    begun = turns * warps * loads
    whole = k % steps == 0 and k % FLOATS == 0
    read, corrected = factor(stored, on).read, needs_sums(stored)
    threads = warps * WARP

    def scaled(total, x_sums, at, held, u):
        if not grouped:
            return total
        scale, added = group_scaling(stored, held.scales[u], held.offsets[u])
        return scale * total + added * x_sums[at] if corrected else scale * total

    @T.inline
    def load(w, s, z, p, at, lane, held, u):
        for v in T.vectorized(elements):
            held.elements[u * elements + v] = w[p, at, lane, v]
        if grouped:
            held.scales[u] = s[p, group_of(stored, at), lane]
            if stored.offsets != "none":
                held.offsets[u] = z[p, group_of(stored, at), lane]

    @T.inline
    def load_turn(w, s, z, p, turn, held, t):
        for u in on.unroll(loads):
            load(w, s, z, p, (turn * loads + u) * warps + t // WARP, t % WARP, held, on.own(t) * loads + u)

    @T.inline
    def multiply(x, i, x_sums, at, skipped, held, u, acc, own):
        """acc += the vector held at u times its steps of x, which begins with step `skipped`."""
        total = T.alloc_buffer((1,), "float32", scope=on.private)
        total[0] = T.float32(0)
        if whole:
            for c in on.unroll(steps // FLOATS):
                some = T.alloc_buffer((FLOATS,), "float32", scope=on.private)
                for v in T.vectorized(FLOATS):
                    some[v] = x[i, at * steps - skipped + c * FLOATS + v]
                for v in on.unroll(FLOATS):
                    total[0] = total[0] + some[v] * read(held.elements, u * elements, c * FLOATS + v)
        else:
            for v in on.unroll(steps):
                total[0] = total[0] + T.if_then_else(at * steps + v < k, x[i, at * steps + v], T.float32(0)) * read(
                    held.elements, u * elements, v
                )
        acc[own] = acc[own] + scaled(total[0], x_sums, at, held, u)

    @T.inline
    def hold(w, s, z, p, held):
        if turns > 0:
            for t in on.threads(threads):
                load_turn(w, s, z, p, 0, held, t)

    @T.inline
    def turns_of(x, i, w, s, z, x_sums, p, held, first, count, skipped, acc, own, t):
        for turn in T.serial(count):
            if first + turn > 0:
                load_turn(w, s, z, p, first + turn, held, t)
            for u in on.unroll(loads):
                multiply(
                    x,
                    i,
                    x_sums,
                    ((first + turn) * loads + u) * warps + t // WARP,
                    skipped,
                    held,
                    on.own(t) * loads + u,
                    acc,
                    own,
                )

    @T.inline
    def dot(x, i, w, s, z, x_sums, p, held, partial, first):
        for t in on.threads(threads):
            acc = T.alloc_buffer((1,), "float32", scope=on.private)
            acc[0] = T.float32(0)
            turns_of(x, i, w, s, z, x_sums, p, held, 0, turns, 0, acc, 0, t)
            for turn in T.serial(-(-(vectors - begun) // warps)):
                if begun + turn * warps + t // WARP < vectors:
                    load(w, s, z, p, begun + turn * warps + t // WARP, t % WARP, held, on.own(t) * loads)
                    multiply(x, i, x_sums, begun + turn * warps + t // WARP, 0, held, on.own(t) * loads, acc, 0)
            partial[first + t // WARP, t % WARP] = acc[0]

    if parts is None:
        return hold, dot
    each = turns // parts

    @T.inline
    def dot_part(x, part, w, s, z, x_sums, p, held, acc):
        for t in on.threads(threads):
            turns_of(
                x,
                0,
                w,
                s,
                z,
                x_sums,
                p,
                held,
                part * each,
                each,
                part * (each * loads * warps * steps),
                acc,
                on.own(t),
                t,
            )

    return hold, dot_part


def equal_parts(stored: Storage, k: int, warps: int, most: int) -> int | None:
    """The least number of parts of whole turns that K can be taken in, each of at most `most` numbers; None if none."""
    steps, loads = vector_steps(stored), _loads(stored)
    turns, left = divmod(vectors_of(stored, k), warps * loads)
    if left or k % steps:
        return None
    return next((n for n in range(1, turns + 1) if turns % n == 0 and k // n <= most), None)


def _loads(stored: Storage) -> int:
    """Number of 16-byte loads that a thread starts before it needs the first."""
    if format_of(stored).words:
        return WORD_LOADS
    return GROUP_LOADS if stored.grouped else LOADS


def held_sizes(stored: Storage) -> tuple[int, int, int]:
    """Numbers in `Held` per thread: elements, scales, offsets; those that a storage lacks take one place."""
    loads = _loads(stored)
    return (
        loads * Loading.of(stored).elements,
        loads if stored.grouped else 1,
        loads if stored.offsets != "none" else 1,
    )


def panel_total(stored: Storage, warps: int):
    """`total(partial, first, s, row, lane)`: one output's sum over the warps, times its scale; a TIR expression.

    The sums of `warps` warps, from `first` on, are added one by one.
    """

    def total(partial: Any, first: int, s: Any, row: Any, lane: Any) -> Any:
        found = partial[first, lane]
        for warp in range(first + 1, first + warps):
            found = found + partial[warp, lane]
        return found * row_scale(stored, s, row) if s is not None and scaled_by_rows(stored) else found

    return total
