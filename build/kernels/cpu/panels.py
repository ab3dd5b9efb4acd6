"""Reading packed weights for float32 arithmetic, and what x and sums have to do with how they are kept."""

from math import gcd

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import AHEAD, LINE, NEAR, prefetch, widened
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import format_of, panel_layout
from runtime.artifact.layouts import DOT, PAIR, PANEL, WORD, WORD_ZERO

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
    """Adjacent steps of K that a float32 product reads at once: two of bfloat16 are 32 bits."""
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


def fetched_unit(shape: Linear):
    """Inline `fetch(w, p, step)`: prefetch the lines of the unit that is some way ahead of this step."""
    unit = unit_of(shape)
    words = format_of(shape.weight).words
    itemsize = ITEMSIZE[panel_layout(shape.weight, shape.n, shape.k).dtype]
    row = PANEL * 4 if words else PANEL * itemsize * steps_together(shape.weight)  # bytes of the innermost axes
    turn = WORD if words else steps_together(shape.weight)
    nbytes = unit * row // turn
    distance = NEAR if words else AHEAD

    @T.inline
    def fetch(w, p, step):
        for line in T.unroll(-(-nbytes // LINE)):
            start = step // turn + (distance + line * LINE) // row
            if len(w.shape) == 3:
                prefetch(w, p, start, (distance + line * LINE) % row // (row // PANEL))
            else:
                prefetch(w, p, start // w.shape[3], 0, 0)

    return fetch


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
