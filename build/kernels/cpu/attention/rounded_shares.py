"""Shares of a row rounded to whole numbers, `SHARE_LEVELS` to the largest of a step, for products with int8 and int4.

A share of float32 is off by half of 1 / SHARE_LEVELS of the step's largest at most, so a mixed value is off by that much
of what the largest share contributes, for each column; the sum itself is exact.
"""

from tvm.script import tirx as T

from build.kernels.cpu.attention.columns import WIDTH
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.vector import reduction
from export.static_model.constants import SMALLEST_PEAK
from runtime.artifact.caches import RING_BLOCK
from runtime.artifact.schemes import ROUNDING_LEVELS

SHARE_LEVELS = ROUNDING_LEVELS["int16"]


def share_rounding(level: Level):
    """Inline `round_shares(scaled, whole, at, steps, i, count)`: set whole[at :] to scaled[:] in levels of steps[i].

    `scaled` has `count` numbers, none negative, in whole blocks; `whole` is int16.
    """
    lanes = fitting_lanes(level, RING_BLOCK)
    fold_max = reduction(lanes, T.max)

    @T.inline
    def round_shares(scaled, whole, at, steps, i, count):
        peak = T.alloc_buffer((lanes,), "float32")
        for v in T.vectorized(lanes):
            peak[v] = T.float32(SMALLEST_PEAK)
        for n in T.serial(count // lanes):
            for v in T.vectorized(lanes):
                peak[v] = T.max(peak[v], scaled[n * lanes + v])
        fold_max(peak)
        steps[i] = peak[0] / T.float32(SHARE_LEVELS)
        peak[0] = T.float32(SHARE_LEVELS) / peak[0]
        for n in T.serial(count // lanes):
            for v in T.vectorized(lanes):
                whole[at + n * lanes + v] = T.Cast("int16", T.nearbyint(scaled[n * lanes + v] * peak[0]))

    return round_shares


