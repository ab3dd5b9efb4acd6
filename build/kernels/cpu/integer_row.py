"""Rounded rows of x, packed as products of whole numbers read them."""

from dataclasses import dataclass
from math import gcd

from tvm.ir import Expr
from tvm.script import tirx as T

from build.kernels.cpu.integer_blocks import block_count, block_size
from build.kernels.cpu.level import Level, fitting_lanes
from build.kernels.cpu.row import prepared_row, rounded_row
from build.kernels.shapes import Linear
from runtime.artifact.layouts import WORD


@dataclass(frozen=True)
class PackedRows:
    """x as (tiles, steps / span, rows, planes, span): of K, padded with zeros, `span` steps of a row side by side."""

    tiles: int
    rows: int  # of a tile; rows past the last of x repeat it
    steps: int  # K, padded to whole words and spans
    span: int
    planes: int  # of two, the first holds higher bytes, the second lower ones
    dtype: str

    @property
    def count(self) -> int:
        """Rows, with those that repeat the last one."""
        return self.tiles * self.rows

    @property
    def size(self) -> int:
        """Numbers of all tiles."""
        return self.count * self.steps * self.planes

    @property
    def stride(self) -> int:
        """Numbers from a span of a row to its next one."""
        return self.rows * self.planes * self.span

    def start(self, tile: Expr | int, step: Expr | int) -> Expr | int:
        """Where a tile's steps from `step` on begin; that is a multiple of span."""
        return (tile * self.steps + step) * self.rows * self.planes

    def row(self, i: Expr) -> Expr:
        """Where row i begins."""
        return self.start(i // self.rows, 0) + i % self.rows * self.planes * self.span


def padded_steps(k: int, span: int) -> int:
    """K, padded to whole words and spans."""
    unit = max(span, WORD)
    return -(-k // unit) * unit


def packed_row(level: Level, shape: Linear, packed: PackedRows, *, sums_too: bool):
    """Inline `pack(x, gain, order, i, out, scales, sums)`: round row i of x.

    scales[i, :] receives the scales of its groups and, with `sums_too`, sums[i, :] the sums of its blocks.
    """
    k, span, planes, steps = shape.k, packed.span, packed.planes, packed.steps
    prepare, round_row = prepared_row(level, shape, as_floats=False), rounded_row(level, shape)
    add_up = _block_sums(level, shape, steps)
    lanes = fitting_lanes(level, span)

    @T.inline
    def pack(x, gain, order, i, out, scales, sums):
        levels = T.alloc_buffer((steps,), "float32")
        prepare(x, T.min(i, shape.rows - 1), gain, order, levels)
        round_row(levels, scales, i)
        for c in T.serial(steps - k):
            levels[k + c] = T.float32(0)
        if sums_too:
            add_up(levels, sums, i)
        at = packed.row(i)
        for n in T.serial(steps // span):
            for c in T.unroll(span // lanes):
                for v in T.vectorized(lanes):
                    if planes == 1:
                        out[at + n * packed.stride + c * lanes + v] = T.Cast(
                            out.dtype, T.Cast("int32", levels[n * span + c * lanes + v])
                        )
                    else:
                        out[at + n * packed.stride + c * lanes + v] = _higher(levels[n * span + c * lanes + v])
                        out[at + n * packed.stride + span + c * lanes + v] = _lower(levels[n * span + c * lanes + v])

    return pack


def _block_sums(level: Level, shape: Linear, steps: int):
    """Inline `add_up(levels, sums, i)`: set sums[i, :] to the sums of the blocks of levels (steps,)."""
    block = block_size(shape)
    lanes = fitting_lanes(level, gcd(block, steps))

    @T.inline
    def add_up(levels, sums, i):
        for b in T.serial(block_count(shape)):
            partial = T.alloc_buffer((lanes,), "int32")
            for v in T.vectorized(lanes):
                partial[v] = 0
            for c in T.serial(T.min(block, steps - b * block) // lanes):
                for v in T.vectorized(lanes):
                    partial[v] = partial[v] + T.Cast("int32", levels[b * block + c * lanes + v])
            sums[i, b] = 0
            for v in T.unroll(lanes):
                sums[i, b] = sums[i, b] + partial[v]

    return add_up


def _higher(level: Expr) -> Expr:
    """The higher byte of a whole number of 16 bits, which is 256 times it plus the lower byte, from -128 to 127."""
    return T.Cast("int8", (T.Cast("int32", level) + 128) >> 8)


def _lower(level: Expr) -> Expr:
    return T.Cast("int8", T.Cast("int32", level) - ((T.Cast("int32", level) + 128) >> 8 << 8))
