"""How a product on the tensor cores of sm_90a is split into blocks and clusters of blocks.

A block has two warpgroups, each of which computes 64 columns of the product, outputs of W, for all rows of x that the
block takes (`wgmma.py`, where W is the factor a and x is b). With SwiGLU, half of the columns are gate and half the up
that goes with it, so that a thread holds both numbers of an output. Blocks of a cluster have the same rows: each copies
its share of them to the shared memory of all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from build.kernels.cuda import mma
from build.kernels.cuda.binding import MULTIPROCESSORS, WARP
from build.kernels.cuda.tiling import BYTES_PER_CLOCK, MOST_SPLITS, STEP, panel_of_block, summing_clocks
from build.kernels.cuda.warpgroups import wgmma
from runtime.artifact.layouts import PANEL

WARPGROUPS = 2
THREADS = WARPGROUPS * wgmma.WARPGROUP
WARPS = THREADS // WARP
COLUMNS = WARPGROUPS * wgmma.ROWS
PANELS = COLUMNS // PANEL
GROUP_PANELS = PANELS // WARPGROUPS
# Blocks of a cluster, and how many blocks in such clusters an H200 holds at once, one on a multiprocessor. Those of a
# cluster are on multiprocessors of the same group (GPC). Some groups have fewer than 16 of them, so that a few
# multiprocessors are left over with clusters of 4; how many is not known exactly.
RESIDENT_BLOCKS = {1: MULTIPROCESSORS, 2: MULTIPROCESSORS, 4: 124}
PRODUCTS_PER_CLOCK = 2048  # of two float16, of a multiprocessor: at their peak of 989 TFLOP/s, by NVIDIA's data sheet


@dataclass(frozen=True)
class WarpgroupTiling:
    """Rows of x per block, blocks of a cluster, and parts that K is split into.

    `halves` is the number of columns for an output: 2 where they are gate and up.
    """

    rows: int
    cluster: int = 1
    splits: int = 1
    halves: int = 1

    @property
    def outputs(self) -> int:
        """Outputs per block."""
        return COLUMNS // self.halves

    def row_blocks(self, rows: int) -> int:
        """Tiles along the rows."""
        return -(-rows // self.rows)

    def column_blocks(self, outputs: int) -> int:
        """Tiles along the outputs, for whole clusters."""
        return -(-outputs // (self.outputs * self.cluster)) * self.cluster

    def blocks(self, rows: int, outputs: int) -> int:
        """Number of blocks in a product."""
        return self.splits * self.row_blocks(rows) * self.column_blocks(outputs)

    def panel(self, first: Any, q: Any, half: int) -> Any:
        """Panel of the matrix that is panel q of a block.

        `first` is the block's first panel, and `half` panels lie between gate and up.
        """
        return panel_of_block(first, q, PANELS // self.halves, half)

    def own_panel(self, t: Any, c: Any) -> Any:
        """Panel, within the block, of column c of a thread's two; these may be gate and up."""
        group = t // wgmma.WARPGROUP
        if self.halves > 1:
            return c * WARPGROUPS + group
        return group * GROUP_PANELS + self._output_of_group(t, c) // PANEL

    def own_column(self, t: Any, c: Any) -> Any:
        """That column, within its panel."""
        return self._output_of_group(t, c) % PANEL

    def output(self, t: Any, c: Any) -> Any:
        """Output, within the block, that this column belongs to."""
        return t // wgmma.WARPGROUP * (self.outputs // WARPGROUPS) + self._output_of_group(t, c)

    def _output_of_group(self, t: Any, c: Any) -> Any:
        """The same within the warpgroup."""
        warp = t % wgmma.WARPGROUP // WARP
        return warp * (mma.ROWS // self.halves) + mma.fragment_row(t, 0 if self.halves > 1 else c)

    def clocks(self, rows: int, outputs: int, k: int, weight_bytes: float) -> float:
        """Estimate for a product, whose blocks take turns on the multiprocessors."""
        products = COLUMNS * self.rows * STEP / PRODUCTS_PER_CLOCK
        loads = STEP * (2 * self.rows / self.cluster + weight_bytes * COLUMNS) / BYTES_PER_CLOCK
        turns = -(-self.blocks(rows, outputs) // RESIDENT_BLOCKS[self.cluster])
        steps = -(-k // (STEP * self.splits))
        return turns * steps * max(products, loads) + summing_clocks(self.splits, self.halves, rows * outputs)


def tilings(rows: int, *, swiglu: bool) -> Iterator[WarpgroupTiling]:
    """Every tiling of a product of so many rows, which are shared out evenly."""
    fewest = -(-rows // wgmma.MOST_COLUMNS)
    for row_blocks, cluster, splits in product(
        range(fewest, 2 * fewest + 1), RESIDENT_BLOCKS, range(1, MOST_SPLITS + 1)
    ):
        tile = -(-rows // (row_blocks * wgmma.COLUMN_STEP)) * wgmma.COLUMN_STEP
        yield WarpgroupTiling(tile, cluster, splits, 2 if swiglu else 1)
