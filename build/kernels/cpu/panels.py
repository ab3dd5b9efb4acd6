"""Reading packed weights for float32 arithmetic, and what x and sums have to do with how they are kept."""

from math import gcd

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import AHEAD, LINE, prefetch, widened
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import format_of, panel_layout
from runtime.artifact.layouts import DOT, PAIR, PANEL, WORD, WORD_ZERO

WIDE = 16  # lanes of AVX-512
ITEMSIZE = {"float32": 4, "int32": 4, "float16": 2, "uint16": 2, "int8": 1, "uint8": 1}


def weight_groups(shape: Linear) -> int:
    """Number of groups along K that have their own scales; one where a row has no groups."""
    return -(-shape.k // (shape.weight.group_size or shape.k))


def arranged_row(level: Level, shape: Linear):
    """Inline `arrange(x, x_sums, row)`: bring x (K,) into the form that kept numbers are multiplied with.

    x_sums[row, :] receives the sum of each group, by which its zero point is subtracted or its minimum added: the sum
    of (q - zero) x is the sum of q x, less zero times the sum of x. int4 numbers are masked out of their words in
    place, which leaves them 8 bits higher for each step of a half: x is divided by that power of two, which is exact.
    """
    size, k = shape.weight.group_size or shape.k, shape.k
    words = format_of(shape.weight).words
    lanes = fitting_lanes(level, gcd(size, k))

    @T.inline
    def add_up(x, x_sums, row):
        for g in T.serial(weight_groups(shape)):
            partial = T.alloc_buffer((lanes,), "float32")
            for v in T.vectorized(lanes):
                partial[v] = T.float32(0)
            for c in T.serial(T.min(size, k - g * size) // lanes):
                for v in T.vectorized(lanes):
                    partial[v] = partial[v] + x[g * size + c * lanes + v]
            x_sums[row, g] = T.float32(0)
            for v in T.unroll(lanes):
                x_sums[row, g] = x_sums[row, g] + partial[v]

    @T.inline
    def for_words(x, x_sums, row):
        add_up(x, x_sums, row)
        for c in T.serial(k // DOT):
            for j in T.unroll(DOT):
                x[c * DOT + j] = x[c * DOT + j] / T.Cast("float32", 1 << (8 * j))

    @T.inline
    def as_it_is(x, x_sums, row):
        pass

    if words:
        return for_words
    return add_up if shape.weight.offsets != "none" else as_it_is


def kept_number(shape: Linear):
    """`kept(w, p, turn, offset, steps, column)`: step `turn * steps + offset` of a panel, as float32; a TIR expression.

    A turn of int4 is a word. Only upper halves of bytes are shifted, by 4, so that no number reaches the sign bit;
    `arranged_row` says what the places of the others are.
    """

    def of_word(w, p: Expr, turn: Expr, offset: Expr, _steps: int, column: Expr) -> Expr:
        place = (w[p, turn, column] >> (offset // DOT * 4)) & (15 << (offset % DOT * 8))
        return T.Cast("float32", place)

    def of_number(w, p: Expr, turn: Expr, offset: Expr, steps: int, column: Expr) -> Expr:
        return number(w, p, turn * steps + offset, column)

    return of_word if format_of(shape.weight).words else of_number


def steps_together(stored: Storage) -> int:
    """Adjacent steps of K that are kept in one number, as a float32 product reads it: two of bfloat16 in 32 bits."""
    return PAIR if panel_layout(stored, PANEL, PAIR).dtype == "uint16" else 1


def padded_k(stored: Storage, k: int) -> int:
    """Steps of K as they are kept; those beyond K are zero."""
    return -(-k // steps_together(stored)) * steps_together(stored)


def as_read(w):
    """Packed weights as a float32 product reads them: pairs of bfloat16 as uint32 (panels, K / 2, PANEL)."""
    if w.dtype != "uint16":
        return w
    return T.decl_buffer(tuple(w.shape[:3]), "uint32", data=w.data)


def number(w, p: Expr, step: Expr, column: Expr) -> Expr:
    """Step `step` of an output of a panel that needs no unpacking, as float32; a TIR expression.

    The bits of a bfloat16 are the upper half of a float32. The second one of a pair is there already.
    """
    if w.dtype == "uint32":
        shift = T.Cast("uint32", (PAIR - 1 - step % PAIR) * 16)
        return T.reinterpret("float32", (w[p, step // PAIR, column] << shift) & T.uint32(0xFFFF0000))
    if len(w.shape) == 3:
        return widened(w[p, step, column])
    together = int(w.shape[3])  # adjacent steps of K
    return widened(w[p, step // together, column, step % together])


def unit_of(shape: Linear) -> int:
    """Steps of K that a float32 product reads at once: those of a word or a pair, or numbers of half a cache line."""
    if format_of(shape.weight).words:
        return WORD
    narrow = ITEMSIZE[panel_layout(shape.weight, shape.n, shape.k).dtype] * PANEL < LINE
    group = shape.weight.group_size or shape.k
    return 2 if narrow and group % 2 == 0 and shape.k % 2 == 0 else steps_together(shape.weight)


def fetched_unit(level: Level, shape: Linear, passes: int):
    """Inline `fetch(w, p, step, n, later, done)`: prefetch beside unit n of the block that begins at `step`.

    One pass over a block prefetches its own lines, `_distance` ahead. Several, of which this one has been preceded by
    `done` units, share the lines of the block that begins at `later`, so that memory is never idle.
    """
    steps = WORD if format_of(shape.weight).words else steps_together(shape.weight)  # of a row of w, as it is read
    row = PANEL * ITEMSIZE[panel_layout(shape.weight, shape.n, shape.k).dtype] * (steps if steps < WORD else 1)  # bytes
    nbytes, distance = unit_of(shape) * row // steps, _distance(level, shape)

    @T.inline
    def fetch_line(w, p, step, line):
        at = T.meta_var(step // steps + line * LINE // row)
        if len(w.shape) == 3:
            prefetch(w, p, at, line * LINE % row * PANEL // row)
        else:
            together = T.meta_var(w.shape[3])
            prefetch(w, p, at // together, at % together * PANEL // together, 0)

    @T.inline
    def ahead(w, p, step, n, later, done):  # noqa: ARG001
        for line in T.unroll(-(-nbytes // LINE) if distance > 0 else 0):
            fetch_line(w, p, step + n * unit_of(shape), distance // LINE + line)

    @T.inline
    def shared(w, p, step, n, later, done):  # noqa: ARG001
        for line in T.unroll(-(-nbytes // (passes * LINE))):
            fetch_line(w, p, later, (done + n) * nbytes // (passes * LINE) + line)

    return ahead if passes == 1 else shared


def _distance(level: Level, shape: Linear) -> int:
    """How many bytes ahead a panel is prefetched, or 0.

    It is the shorter, the less there is to compute before these bytes are needed. Shares of the read bandwidth with one
    row on a core of Sapphire Rapids, AVX-512 and AVX2, without prefetching, with 512 and with 2048: float32 0.82, 0.94,
    0.88 and 0.86, 0.85, 0.79; float16 0.86, 0.84, 0.79 and 0.88, 0.89, 0.85; bfloat16 0.67, 0.89, 0.81 and 0.69, 0.85,
    0.78; int8 0.64, 0.70, 0.75 and 0.54, 0.67, 0.70; int4 0.51, 0.50, 0.57 and 0.33, 0.48, 0.62. On Zen 3, float32 read
    30 GB/s without, 25 with 1024.
    """
    dtype = panel_layout(shape.weight, shape.n, shape.k).dtype
    if shape.rows > 1:
        return AHEAD
    if dtype == "float16" or (dtype == "float32" and level.lanes < WIDE):
        return 0
    return {"float32": 512, "uint16": 512}.get(dtype, AHEAD)


def group_total(stored: Storage, total, x_sum, s, z, p: Expr, g: Expr, column: Expr) -> Expr:
    """A group's part of an output, from the sum of q x over the group and the sum of x; a TIR expression."""
    scale = widened(s[p, g, column])
    if stored.minimums:
        return total * scale + x_sum * widened(z[p, g, column])
    zero = zero_point(stored, z, p, g, column)
    return (total if zero is None else total - x_sum * zero) * scale


def zero_point(stored: Storage, z, p: Expr, g: Expr, column: Expr) -> Expr | None:
    """The zero point of a group without a minimum, as float32; None if it is 0."""
    if stored.zero_points:
        return T.Cast("float32", z[p, g, column])
    return T.float32(WORD_ZERO) if format_of(stored).words else None


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
            return group_total(stored, found, T.float32(1), s, z, panel, column // stored.group_size, lane)
        return found * s[row] if format_of(stored).scaled else found

    return read
