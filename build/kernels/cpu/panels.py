"""Reading packed weights for float32 arithmetic: a panel times a vector, some steps of a panel, or one number."""

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.level import Level
from build.kernels.cpu.vector import AHEAD, LINE, NEAR, add_outer_product, clear, prefetch, widened
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import format_of, panel_layout, scaled_by_rows
from runtime.artifact.layouts import DOT, PANEL, WORD, WORD_ZERO

ITEMSIZE = {"float32": 4, "int32": 4, "float16": 2, "uint16": 2, "int8": 1}


def panel_dot(level: Level, shape: Linear):
    """Inline `dot(p, out, x, x_sums, w, s, z)`: set out[:] to panel p of W times x (K,), PANEL sums in float32.

    Sums past N are garbage, but cause no faults. x and x_sums come from `arranged_row`.
    """
    stored = shape.weight
    words = format_of(stored).words
    return _word_dot(level, stored, shape.k) if words else _number_dot(level, stored, shape.n, shape.k)


def weight_groups(shape: Linear) -> int:
    """Number of groups along K that have their own scales; one where a row has no groups."""
    return -(-shape.k // (shape.weight.group_size or shape.k))


def arranged_row(shape: Linear):
    """Inline `arrange(x, x_sums)`: bring x (K,) into the form that `panel_dot` takes, once for all panels.

    int4 numbers are masked out of their words in place, which leaves them 8 bits higher for each step of a half: x is
    divided by that power of two, which is exact. x_sums receives the sum of each group, by which its zero point is
    subtracted: the sum of (q - zero) x is the sum of q x, less zero times the sum of x.
    """
    size = shape.weight.group_size or shape.k

    @T.inline
    def by_groups(x, x_sums):
        for g in T.serial(weight_groups(shape)):
            x_sums[g] = T.float32(0)
            for c in T.serial(T.min(size, shape.k - g * size)):
                x_sums[g] = x_sums[g] + x[g * size + c]
        for c in T.serial(shape.k // DOT):
            for j in T.unroll(DOT):
                x[c * DOT + j] = x[c * DOT + j] / T.Cast("float32", 1 << (8 * j))

    @T.inline
    def as_it_is(x, x_sums):
        pass

    return by_groups if format_of(shape.weight).words else as_it_is


def _number_dot(level: Level, stored: Storage, n: int, k: int):
    """Inline `dot` for weights that need no unpacking: float32, float16, bfloat16, or int8 with one scale per output.

    The steps of K of a panel are read as several runs at once: the more runs, the more cache lines are in flight from
    memory. int8 is slowed by its conversion as well, and is faster as one run with prefetching.
    """
    lanes, parts = level.lanes, PANEL // level.lanes
    unroll = next(u for u in (level.in_flight // parts, 2, 1) if k % u == 0)
    step = PANEL * ITEMSIZE[panel_layout(stored, n, k).dtype]  # bytes
    runs, steps = (1, unroll) if step < LINE else (unroll, 1)  # steps of each run per iteration
    run = k // runs
    lines = steps * step // LINE if step < LINE else 0
    scale = row_scale(level, n) if format_of(stored).scaled else None

    @T.inline
    def dot(p, out, x, x_sums, w, s, z):  # noqa: ARG001
        sums = T.alloc_buffer((unroll * PANEL,), "float32")
        clear(sums, unroll * parts, lanes)
        for kk in T.serial(run // steps):
            for line in T.unroll(lines):
                prefetch(w, p, kk * steps + (AHEAD + line * LINE) // step, 0)
            for u in T.unroll(unroll):
                at = u // steps * run + kk * steps + u % steps
                add_outer_product(
                    sums, u * PANEL, 1, PANEL, lanes, lambda _row: x[at], lambda column: widened(w[p, at, column])
                )
        for i in T.unroll(parts):
            for v in T.vectorized(lanes):
                out[i * lanes + v] = sums[i * lanes + v]
        for u in T.unroll(unroll - 1):
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    out[i * lanes + v] = out[i * lanes + v] + sums[(u + 1) * PANEL + i * lanes + v]
        if scale is not None:
            scale(out, 0, s, p)

    return dot


def _word_dot(level: Level, stored: Storage, k: int):
    """Inline `dot` for int4: only upper halves of bytes are shifted, by 4, so that no number reaches the sign bit."""
    lanes, parts = level.lanes, PANEL // level.lanes
    words = (stored.group_size or k) // WORD  # per group
    groups = -(-k // (words * WORD))

    @T.inline
    def dot(p, out, x, x_sums, w, s, z):
        clear(out, parts, lanes)
        for g in T.serial(groups):
            sums = T.alloc_buffer((2 * PANEL,), "float32")  # for both halves of a word
            clear(sums, 2 * parts, lanes)
            for word in T.serial(T.min(words, k // WORD - g * words)):
                at = g * words + word
                for line in T.unroll(PANEL * 4 // LINE):
                    prefetch(w, p, at + NEAR // (PANEL * 4), line * LINE // 4)
                for half in T.unroll(2):
                    for j in T.unroll(DOT):
                        add_outer_product(
                            sums,
                            half * PANEL,
                            1,
                            PANEL,
                            lanes,
                            lambda _row: x[at * WORD + half * DOT + j],
                            lambda column: T.Cast("float32", (w[p, at, column] >> (4 * half)) & (15 << (8 * j))),
                        )
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    out[i * lanes + v] = out[i * lanes + v] + (
                        sums[i * lanes + v]
                        + sums[PANEL + i * lanes + v]
                        - x_sums[g] * zero_point(stored, z, p, g, i * lanes + v)
                    ) * widened(s[p, g, i * lanes + v])

    return dot


def zero_point(stored: Storage, z, p: Expr, g: Expr, column: Expr) -> Expr:
    """Zero point of a group, as float32."""
    return T.Cast("float32", z[p, g, column]) if stored.zero_points else T.float32(WORD_ZERO)


def row_scale(level: Level, n: int):
    """Inline `scale(out, start, s, p)`: out[start : start + PANEL] *= s[p * PANEL :], as far as there are outputs."""
    lanes, parts = level.lanes, PANEL // level.lanes

    @T.inline
    def scale(out, start, s, p):
        if n % PANEL == 0:
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    out[start + i * lanes + v] = out[start + i * lanes + v] * s[p * PANEL + i * lanes + v]
        else:
            for j in T.serial(T.min(PANEL, n - p * PANEL)):
                out[start + j] = out[start + j] * s[p * PANEL + j]

    return scale


def output_scale(level: Level, shape: Linear):
    """`row_scale` where the weight has one scale per output, otherwise an inline that does nothing."""
    if scaled_by_rows(shape.weight):
        return row_scale(level, shape.n)

    @T.inline
    def nothing(out, start, s, p):
        pass

    return nothing


def panel_slab(level: Level, shape: Linear):
    """Inline `fill(w, s, z, p, start, count, slab)`: slab (count, PANEL) float32 = steps of panel p.

    The steps are start .. start + count - 1. A scale per output is applied to the sums later; group scales are
    multiplied in.
    """
    stored = shape.weight
    lanes, parts = level.lanes, PANEL // level.lanes
    size = stored.group_size or shape.k

    @T.inline
    def fill_numbers(w, s, z, p, start, count, slab):  # noqa: ARG001
        for d in T.serial(count):
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    slab[d, i * lanes + v] = widened(w[p, start + d, i * lanes + v])

    @T.inline
    def fill_words(w, s, z, p, start, count, slab):
        for word in T.serial(count // WORD):
            g = (start + word * WORD) // size
            for half in T.unroll(2):
                for j in T.unroll(DOT):
                    for i in T.unroll(parts):
                        for v in T.vectorized(lanes):
                            slab[word * WORD + half * DOT + j, i * lanes + v] = (
                                T.Cast(
                                    "float32", (w[p, start // WORD + word, i * lanes + v] >> (8 * j + 4 * half)) & 15
                                )
                                - zero_point(stored, z, p, g, i * lanes + v)
                            ) * widened(s[p, g, i * lanes + v])

    return fill_words if format_of(stored).words else fill_numbers


def weight_at(stored: Storage):
    """`read(w, s, z, row, column)`: one weight as float32, a TIR expression."""

    def read(w, s, z, row: Expr, column: Expr) -> Expr:
        panel, lane = row // PANEL, row % PANEL
        if format_of(stored).words:
            g = column // stored.group_size
            word = w[panel, column // WORD, lane] >> (8 * (column % DOT) + 4 * (column % WORD // DOT))
            return (T.Cast("float32", word & 15) - zero_point(stored, z, panel, g, lane)) * widened(s[panel, g, lane])
        together = int(w.shape[3]) if len(w.shape) == 4 else None  # adjacent steps of K
        number = (
            widened(w[panel, column, lane])
            if together is None
            else widened(w[panel, column // together, lane, column % together])
        )
        return number * s[row] if format_of(stored).scaled else number

    return read
