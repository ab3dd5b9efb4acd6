"""The start of every product: one row of x, normalised if the shape has a norm, rounded if weights are dynamic."""

from tvm.script import tirx as T

from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.norm import inverse_rms
from build.kernels.shapes import Linear
from export.static_model.constants import DYNAMIC_LEVELS, SMALLEST_PEAK


def prepared_row(level: Level, shape: Linear):
    """Inline `prepare(x, row, gain, out)`: set out[: K] to the x that row `row` of y is computed from."""
    k = shape.k
    lanes = fitting_lanes(level, k)
    factor = inverse_rms(level, k, shape.norm_eps)

    @T.inline
    def prepare(x, row, gain, out):
        scale = T.alloc_buffer((1,), "float32")
        factor(x, shape.x_row(row), scale)
        for c in T.serial(k // lanes):
            for v in T.vectorized(lanes):
                if shape.norm_eps is None:
                    out[c * lanes + v] = x[shape.x_row(row), c * lanes + v]
                else:
                    out[c * lanes + v] = x[shape.x_row(row), c * lanes + v] * scale[0] * gain[c * lanes + v]

    return prepare


def rounded_row(level: Level, shape: Linear):
    """Inline `round_row(row, scales, i)`: round row[: K] to whole levels from -127 to 127, as float32.

    The size of a level of group g is scales[i, g] = max |group| / 127.
    """
    together = shape.weight.rounded_together(shape.k)
    lanes = fitting_lanes(level, together)

    @T.inline
    def round_row(row, scales, i):
        for g in T.serial(shape.k // together):
            at = g * together
            peak = T.alloc_buffer((lanes,), "float32")
            for v in T.vectorized(lanes):
                peak[v] = T.float32(0)
            for c in T.serial(together // lanes):
                for v in T.vectorized(lanes):
                    peak[v] = T.max(peak[v], T.abs(row[at + c * lanes + v]))
            scales[i, g] = peak[0]
            for v in T.unroll(lanes):
                scales[i, g] = T.max(scales[i, g], peak[v])
            scales[i, g] = (scales[i, g] + T.float32(SMALLEST_PEAK)) / T.float32(DYNAMIC_LEVELS)
            for c in T.serial(together // lanes):
                for v in T.vectorized(lanes):
                    row[at + c * lanes + v] = T.nearbyint(row[at + c * lanes + v] / scales[i, g])

    return round_row
