"""The start of every product: one row of x, normalised if the shape has a norm, in the order of the weight's columns if
that is not the matrix's own, and rounded if the shape's weight asks for it.
"""

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.norm import inverse_rms
from build.kernels.cpu.vector import as_bfloat16, exact_quotient, reduced
from build.kernels.shapes import Linear
from export.static_model.constants import SMALLEST_PEAK
from runtime.artifact.schemes import ROUNDING_LEVELS


def prepared_row(level: Level, shape: Linear, *, as_floats: bool = True):
    """Inline `prepare(x, row, gain, order, out)`: set out[: K] to the x that row `row` of y is computed from.

    Where activations are rounded, `out` is what they are rounded to, if they are multiplied `as_floats`; otherwise
    `rounded_row` is still to follow.
    """
    k = shape.k
    lanes = fitting_lanes(level, k)
    factor = inverse_rms(level, k, shape.norm_eps)

    @T.inline
    def in_own_order(x, row, gain, out):
        scale = T.alloc_buffer((1,), "float32")
        factor(x, row, scale)
        for c in T.serial(k // lanes):
            for v in T.vectorized(lanes):
                if shape.norm_eps is None:
                    out[c * lanes + v] = x[row, c * lanes + v]
                else:
                    out[c * lanes + v] = x[row, c * lanes + v] * scale[0] * gain[c * lanes + v]

    @T.inline
    def ordered(x, row, gain, order, out):
        if shape.weight.reordered:
            plain = T.alloc_buffer((k,), "float32")
            in_own_order(x, row, gain, plain)
            for c in T.serial(k):
                out[c] = plain[order[c]]
        else:
            in_own_order(x, row, gain, out)

    if not (as_floats and shape.weight.rounds):
        return ordered
    in_levels = shape.weight.rounding in ROUNDING_LEVELS
    round_row = _row_of_levels(level, shape) if in_levels else _row_of_bfloat16(level, shape)

    @T.inline
    def prepare(x, row, gain, order, out):
        ordered(x, row, gain, order, out)
        round_row(out)

    return prepare


def _row_of_bfloat16(level: Level, shape: Linear):
    """Inline `round_row(row)`: round row[: K] to bfloat16, as float32."""
    lanes = fitting_lanes(level, shape.k)

    @T.inline
    def round_row(row):
        for c in T.serial(shape.k // lanes):
            for v in T.vectorized(lanes):
                row[c * lanes + v] = as_bfloat16(row[c * lanes + v])

    return round_row


def _row_of_levels(level: Level, shape: Linear):
    """Inline `round_row(row)`: round row[: K] to multiples of its groups' levels, as float32."""
    k, together = shape.k, shape.weight.rounded_together(shape.k)
    in_levels = rounded_row(level, shape)

    @T.inline
    def round_row(row):
        scales = T.alloc_buffer((1, k // together), "float32")
        in_levels(row, scales, 0)
        for c in T.serial(k):
            row[c] = row[c] * scales[0, c // together]

    return round_row


def rounded_row(level: Level, shape: Linear):
    """Inline `round_row(row, scales, i)`: round row[: K] to whole levels, as float32.

    The size of a level of group g is scales[i, g] = max |group| / the number of levels.
    """
    levels = ROUNDING_LEVELS[shape.weight.rounding]
    together = shape.weight.rounded_together(shape.k)
    lanes = fitting_lanes(level, together)
    fuses = "fma" in level.flags

    def quotient(x: Expr, scale: Expr, inverse: Expr) -> Expr:
        return exact_quotient(x, scale, inverse) if fuses else x / scale

    @T.inline
    def round_row(row, scales, i):
        for g in T.serial(shape.k // together):
            at = g * together
            peak = T.alloc_buffer((lanes,), "float32")
            inverse = T.alloc_buffer((1,), "float32")
            for v in T.vectorized(lanes):
                peak[v] = T.float32(0)
            for c in T.serial(together // lanes):
                for v in T.vectorized(lanes):
                    peak[v] = T.max(peak[v], T.abs(row[at + c * lanes + v]))
            scales[i, g] = (reduced(peak, lanes, T.max) + T.float32(SMALLEST_PEAK)) / T.float32(levels)
            inverse[0] = T.float32(1) / scales[i, g]
            for c in T.serial(together // lanes):
                for v in T.vectorized(lanes):
                    row[at + c * lanes + v] = T.nearbyint(quotient(row[at + c * lanes + v], scales[i, g], inverse[0]))

    return round_row
