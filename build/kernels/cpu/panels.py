"""Reading packed weights: a panel times a vector, some steps of a panel as float32, one number."""

from tvm.script import tirx as T

from build.kernels.cpu.level import Level
from build.kernels.cpu.vector import widened
from build.layout import PANEL
from export.quantize import MatrixFormat


def panel_dot(level: Level, stored: MatrixFormat, n: int, k: int):
    """Inline `dot(x, w, s, z, p, out)`: out[:] = panel p of W times x (K,), PANEL sums in float32; sums beyond N are rubbish, not faults."""
    return _scaled_dot(level, k, n) if stored.scaled else _plain_dot(level, k)


def _plain_dot(level: Level, k: int):
    """Numbers that are weights as they stand, in float32 or narrower."""
    lanes, parts = level.lanes, PANEL // level.lanes
    unroll = next(u for u in (level.in_flight // parts, 2, 1) if k % u == 0)

    @T.inline
    def dot(x, w, s, z, p, out):  # noqa: ARG001 (no scales)
        sums = T.alloc_buffer((unroll * PANEL,), "float32")
        for i in T.unroll(unroll * parts):
            for v in T.vectorized(lanes):
                sums[i * lanes + v] = T.float32(0)
        for kk in T.serial(k // unroll):
            for u in T.unroll(unroll):
                for i in T.unroll(parts):
                    for v in T.vectorized(lanes):
                        sums[u * PANEL + i * lanes + v] = sums[u * PANEL + i * lanes + v] + x[kk * unroll + u] * widened(
                            w[p, kk * unroll + u, i * lanes + v]
                        )
        for i in T.unroll(parts):
            for v in T.vectorized(lanes):
                out[i * lanes + v] = sums[i * lanes + v]
        for u in T.unroll(unroll - 1):
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    out[i * lanes + v] = out[i * lanes + v] + sums[(u + 1) * PANEL + i * lanes + v]

    return dot


def _scaled_dot(level: Level, k: int, n: int):
    """int8 with one scale per output: the same sums, scaled at the end."""
    plain = _plain_dot(level, k)
    scale_panel = scale_outputs(level, n)

    @T.inline
    def dot(x, w, s, z, p, out):
        plain(x, w, s, z, p, out)
        scale_panel(out, 0, s, p)

    return dot


def scale_outputs(level: Level, n: int):
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


def is_float32(stored: MatrixFormat) -> bool:
    """Whether a matrix product can read the panels as they are."""
    return stored.dtype == "float32"


def panel_slab(level: Level, stored: MatrixFormat):
    """Inline `fill(w, s, z, p, start, count, slab)`: slab (count, PANEL) float32 = steps start .. start + count - 1 of panel p."""
    lanes, parts = level.lanes, PANEL // level.lanes

    @T.inline
    def fill(w, s, z, p, start, count, slab):  # noqa: ARG001 (scales are applied to the sums)
        for d in T.serial(count):
            for i in T.unroll(parts):
                for v in T.vectorized(lanes):
                    slab[d, i * lanes + v] = widened(w[p, start + d, i * lanes + v])

    return fill


def weight_at(stored: MatrixFormat):
    """`read(w, s, z, row, column)`: one weight as float32, a TIR expression."""

    def read(w, s, z, row, column):  # noqa: ARG001
        number = widened(w[row // PANEL, column, row % PANEL])
        return number * s[row] if stored.scaled else number

    return read
