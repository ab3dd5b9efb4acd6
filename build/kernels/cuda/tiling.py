"""How a product on tensor cores is split into blocks: the tile of each, and what its warps and lanes hold.

A block computes a tile of rows of x times columns of the product, which are outputs of W. Its 8 warps take a part each,
in products of 16 x 8 (`mma.py`). With SwiGLU, half of a warp's columns are gate and half the up that goes with it, so
that a lane holds both numbers of an output.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

from build.kernels.cuda import mma
from build.kernels.cuda.binding import MULTIPROCESSORS, WARP
from build.kernels.cuda.mma import QUAD
from runtime.artifact.layouts import PANEL

WARPS = 8
THREADS = WARPS * WARP
STEP = 32  # of K: what a quad's lanes hold in 16 bytes of x each
# Warps along the rows, and pieces of a warp along rows and columns: 128 x 256, 128 x 192 and 128 x 128; 64 x 256 and
# 64 x 128; 32 x 256 and 32 x 128. A part of 64 x 64 or 64 x 32 has the fewest reads of shared memory for a product.
TILES = ((2, 4, 8), (2, 4, 6), (2, 4, 4), (1, 4, 4), (1, 4, 2), (1, 2, 4), (1, 2, 2))
MOST_SPLITS = 8

# An H200, for the choice of a tile. Its 132 multiprocessors read 5.2 TB/s from the second-level (L2) cache in the
# product before this one, which waited for that. mma.sync is said to reach 63 % of the peak, which is one product in
# each clock of a multiprocessor (Luo et al. 2024, arXiv 2402.13499).
BYTES_PER_CLOCK = 23  # from the cache to one multiprocessor
CLOCKS_PER_PRODUCT = 1.6
LAUNCH_CLOCKS = 4000  # of a launch more


@dataclass(frozen=True)
class Tiling:
    """Warps along the rows, pieces of a warp, each of 16 rows or 8 columns, and parts that K is split into.

    `halves` is the number of columns for an output: 2 where they are gate and up.
    """

    row_warps: int
    row_pieces: int
    column_pieces: int
    splits: int = 1
    halves: int = 1

    @property
    def column_warps(self) -> int:
        """Warps along the columns."""
        return WARPS // self.row_warps

    @property
    def rows(self) -> int:
        """Rows per block."""
        return self.row_warps * self.row_pieces * mma.ROWS

    @property
    def columns(self) -> int:
        """Columns per block: rows of W."""
        return self.column_warps * self.column_pieces * mma.COLUMNS

    @property
    def outputs(self) -> int:
        """Outputs per block."""
        return self.columns // self.halves

    @property
    def panels(self) -> int:
        """Panels of W per block."""
        return self.columns // PANEL

    @property
    def output_pieces(self) -> int:
        """Pieces of 8 outputs per warp."""
        return self.column_pieces // self.halves

    @property
    def sums(self) -> int:
        """Sums per lane."""
        return self.row_pieces * self.column_pieces * mma.C

    def row_blocks(self, rows: int) -> int:
        """Tiles along the rows."""
        return -(-rows // self.rows)

    def blocks(self, rows: int, outputs: int) -> int:
        """Number of blocks in a product."""
        return self.splits * self.row_blocks(rows) * -(-outputs // self.outputs)

    def panel(self, first: Any, q: Any, half: int) -> Any:
        """Panel of the matrix that is panel q of a block.

        `first` is the block's first panel, and `half` panels lie between gate and up.
        """
        return panel_of_block(first, q, self.panels // self.halves, half)

    def first_row(self, t: Any, r: Any) -> Any:
        """First row, within the block, of row piece r of a thread's warp."""
        return (t // WARP // self.column_warps * self.row_pieces + r) * mma.ROWS

    def first_output(self, t: Any, c: Any) -> Any:
        """First output, within the block, of column piece c of a thread's warp."""
        return (t // WARP % self.column_warps * self.output_pieces + c % self.output_pieces) * mma.COLUMNS

    def first_column(self, t: Any, c: Any) -> Any:
        """First column, within the block's panels, of that piece: those of gate lie before those of up."""
        return c // self.output_pieces * self.outputs + self.first_output(t, c)

    def row(self, t: Any, r: Any, i: Any) -> Any:
        """Row, within the block, of a lane's sum i of row piece r."""
        return self.first_row(t, r) + mma.fragment_row(t, i // 2)

    def output(self, t: Any, c: Any, i: Any) -> Any:
        """Output, within the block, of a lane's sum i of column piece c."""
        return self.first_output(t, c) + t % QUAD * 2 + i % 2

    def place(self, r: Any, c: Any, i: Any = 0, half: int = 0) -> Any:
        """Index at which a lane keeps that sum; `half` is 1 for up."""
        return (r * self.column_pieces + half * self.output_pieces + c) * mma.C + i

    def clocks(self, rows: int, outputs: int, k: int, weight_bytes: float) -> float:
        """Estimate for a product, whose blocks take turns on the multiprocessors."""
        products = self.rows // mma.ROWS * (self.columns // mma.COLUMNS) * (STEP // mma.DEPTH) * CLOCKS_PER_PRODUCT
        loads = STEP * (2 * self.rows + weight_bytes * self.columns) / BYTES_PER_CLOCK
        turns = -(-self.blocks(rows, outputs) // MULTIPROCESSORS)
        return turns * -(-k // (STEP * self.splits)) * max(products, loads) + summing_clocks(
            self.splits, self.halves, rows * outputs
        )


def panel_of_block(first: Any, q: Any, each: int, half: int) -> Any:
    """Panel of the matrix that is panel q of a block with `each` panels of gate, and up `half` panels behind it."""
    return first + q % each + q // each * half


def summing_clocks(splits: int, halves: int, outputs: int) -> float:
    """Estimate for the launch that adds up the float32 sums of the parts of K, which are written and read."""
    if splits == 1:
        return 0
    return LAUNCH_CLOCKS + 2 * 4 * splits * halves * outputs / (MULTIPROCESSORS * BYTES_PER_CLOCK)


def tilings(*, swiglu: bool, most_splits: int = MOST_SPLITS) -> Iterator[Tiling]:
    """Every tiling of a product."""
    for tile, splits in product(TILES, range(1, most_splits + 1)):
        yield Tiling(*tile, splits, 2 if swiglu else 1)
