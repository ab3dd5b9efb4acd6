"""Blocks of K whose sum stays a whole number, and how such a sum becomes part of an output.

x = q s with s = max |x| / levels and q = round(x / s), exactly as in the ONNX graph. y is the sum, over the groups of
K, of s times the sum of q w, times the weight's scale, which may be that of the group. The sum over a block of K is
less than 256 * 32512 * 255 = 2^31 - 25 * 10^6 in any case.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.level import Level
from build.kernels.cpu.vector import widened
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import format_of
from runtime.artifact.layouts import DOT, PANEL, WORD_ZERO

STEP = PANEL * DOT  # weights of a panel in four steps of K
BLOCK = 256  # steps of K whose sum stays an integer, where x has one scale per row


def block_size(shape: Linear) -> int:
    """Steps of K that share an integer sum: a group of weights or of x, or BLOCK where x has one scale per row."""
    together = shape.weight.rounded_together(shape.k)
    return shape.weight.group_size or (together if together < shape.k else BLOCK)


def block_count(shape: Linear) -> int:
    """Blocks in a row."""
    return -(-shape.k // block_size(shape))


def word_offset(stored: Storage) -> int:
    """How far numbers from 0 to 15 are above their value, apart from zero points."""
    return WORD_ZERO if stored.offsets == "none" else 0


def above_value(stored: Storage, kept_above: int) -> int:
    """How far numbers are above their value where they are multiplied; of a byte, `kept_above`."""
    return word_offset(stored) if format_of(stored).words else kept_above


def block_part(shape: Linear, above: int, zero_points: bool, planes: int, partials: int, columns: int = PANEL):
    """`part(sums, at, x_scales, x_sums, row, s, z, p, b, column)`: what a block adds to an output; a TIR expression.

    The sums (planes, columns * partials) of the row begin at `at`. They are of weights `above` their values, and, with
    `zero_points`, by their group's zero point more. What is due to that is subtracted first; a minimum is added as
    often as the block's numbers of x say.
    """
    stored = shape.weight
    block, together = block_size(shape), stored.rounded_together(shape.k)

    def plane(sums, first, column):
        at = first + column * partials
        return sums[at] if partials == 1 else sums[at] + sums[at + 1]

    def whole(sums, at, column):
        if planes == 1:
            return plane(sums, at, column)
        return (plane(sums, at, column) << 8) + plane(sums, at + columns * partials, column)

    def exact(sums, at, x_sums, row, z, p, b, column):
        found = whole(sums, at, column)
        if zero_points:
            return found - x_sums[row, b] * (T.Cast("int32", z[p, b, column]) + T.int32(above))
        return found - x_sums[row, b] * T.int32(above) if above else found

    def part(sums, at, x_scales, x_sums, row, s, z, p, b, column) -> Expr:
        x_scale = x_scales[row, b * block // together]
        total = T.Cast("float32", exact(sums, at, x_sums, row, z, p, b, column)) * x_scale
        if not stored.grouped:
            return total
        total = total * widened(s[p, b, column])
        if not stored.minimums:
            return total
        return total + T.Cast("float32", x_sums[row, b]) * x_scale * widened(z[p, b, column])

    return part


def needs_x_sums(stored: Storage, above: int, zero_points: bool) -> bool:
    """Whether `block_part` reads x_sums."""
    return bool(above) or zero_points or stored.minimums


def fold(level: Level, shape: Linear, kept_above: int, planes: int, partials: int):
    """Inline `add(sums, at, x_scales, x_sums, row, s, z, p, b, total)`: add a block's sums to total[row].

    total is (rows, PANEL). Numbers of a byte are `kept_above` their value.
    """
    stored, lanes, parts = shape.weight, level.lanes, PANEL // level.lanes
    part = block_part(shape, above_value(stored, kept_above), stored.zero_points, planes, partials)

    @T.inline
    def add(sums, at, x_scales, x_sums, row, s, z, p, b, total):
        for i in T.unroll(parts):
            for v in T.vectorized(lanes):
                total[row * PANEL + i * lanes + v] = total[row * PANEL + i * lanes + v] + part(
                    sums, at, x_scales, x_sums, row, s, z, p, b, i * lanes + v
                )

    return add
