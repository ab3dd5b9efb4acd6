"""Reading packed weights for float32 arithmetic: a panel times a vector, some steps of a panel, or one number."""

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.level import Level
from build.kernels.cpu.vector import AHEAD, LINE, NEAR, add_outer_product, clear, prefetch, widened
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import format_of, panel_layout, scaled_by_rows
from runtime.artifact.layouts import DOT, PANEL, WORD, WORD_ZERO

ITEMSIZE = {"float32": 4, "int32": 4, "float16": 2, "uint16": 2, "int8": 1, "uint8": 1}


def panel_dot(level: Level, shape: Linear):
    """Inline `dot(p, out, x, x_sums, w, s, z)`: set out[:] to panel p of W times x (K,), PANEL sums in float32.

    Sums past N are garbage, but cause no faults. x and x_sums come from `arranged_row`.
    """
    stored = shape.weight
    if format_of(stored).words:
        return _word_dot(level, stored, shape.k)
    if stored.grouped:
        return _grouped_dot(level, stored, shape.k)
    return _number_dot(level, stored, shape.n, shape.k)


def weight_groups(shape: Linear) -> int:
    """Number of groups along K that have their own scales; one where a row has no groups."""
    return -(-shape.k // (shape.weight.group_size or shape.k))


def arranged_row(shape: Linear):
    """Inline `arrange(x, x_sums)`: bring x (K,) into the form that `panel_dot` takes, once for all panels.

    x_sums receives the sum of each group, by which its zero point is subtracted or its minimum added: the sum of
    (q - zero) x is the sum of q x, less zero times the sum of x. int4 numbers are masked out of their words in place,
    which leaves them 8 bits higher for each step of a half: x is divided by that power of two, which is exact.
    """
    size = shape.weight.group_size or shape.k
    words = format_of(shape.weight).words

    @T.inline
    def add_up(x, x_sums):
        for g in T.serial(weight_groups(shape)):
            x_sums[g] = T.float32(0)
            for c in T.serial(T.min(size, shape.k - g * size)):
                x_sums[g] = x_sums[g] + x[g * size + c]

    @T.inline
    def for_words(x, x_sums):
        add_up(x, x_sums)
        for c in T.serial(shape.k // DOT):
            for j in T.unroll(DOT):
                x[c * DOT + j] = x[c * DOT + j] / T.Cast("float32", 1 << (8 * j))

    @T.inline
    def as_it_is(x, x_sums):
        pass

    if words:
        return for_words
    return add_up if shape.weight.offsets != "none" else as_it_is


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
                ahead(w, p, kk * steps + (AHEAD + line * LINE) // step)
            for u in T.unroll(unroll):
                at = u // steps * run + kk * steps + u % steps
                add_outer_product(
                    sums, u * PANEL, 1, PANEL, lanes, lambda _row: x[at], lambda column: number(w, p, at, column)
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


def _grouped_dot(level: Level, stored: Storage, k: int):
    """Inline `dot` for numbers of 8 bits in groups; several steps at once hide the latency of a multiply-add."""
    lanes, parts, size = level.lanes, PANEL // level.lanes, stored.group_size or k
    unroll = next(u for u in (level.in_flight // parts, 2, 1) if size % u == 0 and k % u == 0)

    @T.inline
    def dot(p, out, x, x_sums, w, s, z):
        clear(out, parts, lanes)
        for g in T.serial(-(-k // size)):
            sums = T.alloc_buffer((unroll * PANEL,), "float32")
            clear(sums, unroll * parts, lanes)
            for d in T.serial(T.min(size, k - g * size) // unroll):
                at = g * size + d * unroll
                for line in T.unroll(-(-unroll * PANEL // LINE)):
                    ahead(w, p, at + (AHEAD + line * LINE) // PANEL)
                for u in T.unroll(unroll):
                    add_outer_product(
                        sums, u * PANEL, 1, PANEL, lanes, lambda _row: x[at + u], lambda c: number(w, p, at + u, c)
                    )
            for u in T.unroll(unroll - 1):
                for i in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        sums[i * lanes + v] = sums[i * lanes + v] + sums[(u + 1) * PANEL + i * lanes + v]
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    out[i * lanes + v] = out[i * lanes + v] + group_total(
                        stored,
                        sums[i * lanes + v],
                        x_sums[g] if stored.offsets != "none" else None,
                        s,
                        z,
                        p,
                        g,
                        i * lanes + v,
                    )

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
                    out[i * lanes + v] = out[i * lanes + v] + group_total(
                        stored, sums[i * lanes + v] + sums[PANEL + i * lanes + v], x_sums[g], s, z, p, g, i * lanes + v
                    )

    return dot


def number(w, p: Expr, step: Expr, column: Expr) -> Expr:
    """Step `step` of an output of a panel that needs no unpacking, as float32; a TIR expression."""
    if len(w.shape) == 3:
        return widened(w[p, step, column])
    together = int(w.shape[3])  # adjacent steps of K
    return widened(w[p, step // together, column, step % together])


@T.inline
def ahead(w, p, step):
    """Prefetch the steps of a panel from `step` on, which need not exist."""
    if len(w.shape) == 3:
        prefetch(w, p, step, 0)
    else:
        prefetch(w, p, step // w.shape[3], 0, 0)


def group_total(stored: Storage, total, x_sum, s, z, p: Expr, g: Expr, column: Expr) -> Expr:
    """A group's part of an output, from the sum of q x over the group and the sum of x; a TIR expression."""
    scale = widened(s[p, g, column])
    if stored.minimums:
        return total * scale + x_sum * widened(z[p, g, column])
    zero = zero_point(stored, z, p, g, column)
    return (total if zero is None else total - x_sum * zero) * scale


def weight_of(stored: Storage, number: Expr, s, z, p: Expr, g: Expr, column: Expr) -> Expr:
    """A weight, from its number in a group as float32; a TIR expression."""
    scale = widened(s[p, g, column])
    if stored.minimums:
        return number * scale + widened(z[p, g, column])
    zero = zero_point(stored, z, p, g, column)
    return (number if zero is None else number - zero) * scale


def zero_point(stored: Storage, z, p: Expr, g: Expr, column: Expr) -> Expr | None:
    """The zero point of a group without a minimum, as float32; None if it is 0."""
    if stored.zero_points:
        return T.Cast("float32", z[p, g, column])
    return T.float32(WORD_ZERO) if format_of(stored).words else None


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

    def weight(number, s, z, p, step, column):
        return weight_of(stored, number, s, z, p, step // size, column) if stored.grouped else number

    @T.inline
    def fill_numbers(w, s, z, p, start, count, slab):
        for d in T.serial(count):
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    slab[d, i * lanes + v] = weight(
                        number(w, p, start + d, i * lanes + v), s, z, p, start + d, i * lanes + v
                    )

    @T.inline
    def fill_words(w, s, z, p, start, count, slab):
        for word in T.serial(count // WORD):
            for half in T.unroll(2):
                for j in T.unroll(DOT):
                    for i in T.unroll(parts):
                        for v in T.vectorized(lanes):
                            slab[word * WORD + half * DOT + j, i * lanes + v] = weight(
                                T.Cast(
                                    "float32", (w[p, start // WORD + word, i * lanes + v] >> (8 * j + 4 * half)) & 15
                                ),
                                s,
                                z,
                                p,
                                start + word * WORD,
                                i * lanes + v,
                            )

    return fill_words if format_of(stored).words else fill_numbers


def weight_at(stored: Storage):
    """`read(w, s, z, row, column)`: one weight as float32, a TIR expression."""

    def found_at(w, panel, lane, column: Expr) -> Expr:
        if not format_of(stored).words:
            return number(w, panel, column, lane)
        word = w[panel, column // WORD, lane] >> (8 * (column % DOT) + 4 * (column % WORD // DOT))
        return T.Cast("float32", word & 15)

    def read(w, s, z, row: Expr, column: Expr) -> Expr:
        panel, lane = row // PANEL, row % PANEL
        found = found_at(w, panel, lane, column)
        if stored.grouped:
            return weight_of(stored, found, s, z, panel, column // stored.group_size, lane)
        return found * s[row] if format_of(stored).scaled else found

    return read
