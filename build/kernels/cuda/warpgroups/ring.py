"""What a block of a product on the tensor cores of sm_90a keeps in shared memory: a ring of stages of x and W.

A stage is one chunk of K, or two where a chunk is a single step, with the numbers of both as `rounded_rows.py` and the
artifact have them: of x, 16 bytes of every row lie together, and behind them the next 16; of W, four vectors of each
column, with the scales and offsets of the vectors' groups.

Eight lanes read W at a time, in two columns of four vectors. The vectors of a panel lie 2 units further apart than they
would need to, so that these are in different banks.
"""

from dataclasses import dataclass
from typing import Any

from build.kernels.cuda.binding import LARGEST_SHARED_BYTES
from build.kernels.cuda.mma import QUAD
from build.kernels.cuda.pair_weights import WORDS
from build.kernels.cuda.rounded_rows import Chunks
from build.kernels.cuda.tile_ring import Groups, groups_of
from build.kernels.cuda.warpgroups.tiling import PANELS, WarpgroupTiling
from export.weights.format import Storage
from runtime.artifact.layouts import PANEL, VECTOR

LEAST_STEPS = 2  # of a stage, which multiply from registers in turns
FEWEST_STAGES, MOST_STAGES = 3, 4
VECTOR_UNITS = PANEL + 2  # from one vector of a panel to the next
BARRIER_BYTES = 8  # of each stage's barrier


@dataclass(frozen=True)
class Stage:
    """Sizes of a stage, in units of 16 bytes."""

    tiling: WarpgroupTiling
    parts: int  # steps in a chunk
    chunks: int
    scales: Groups
    offsets: Groups

    @classmethod
    def of(cls, stored: Storage, tiling: WarpgroupTiling) -> "Stage":
        """A stage of a product with such weights."""
        parts = Chunks.of(stored, PANEL).parts
        return cls(tiling, parts, max(LEAST_STEPS // parts, 1), *groups_of(stored))

    @property
    def steps(self) -> int:
        """Of 32 numbers of K."""
        return self.chunks * self.parts

    @property
    def vectors(self) -> int:
        """Vectors of W, each of a panel."""
        return self.chunks * PANELS * QUAD

    @property
    def begins(self) -> tuple[int, int, int, int, int]:
        """Where x, weights, scales and offsets begin, and where the last of them end."""
        weights = self.steps * WORDS * self.tiling.rows
        scales = weights + self.vectors * VECTOR_UNITS
        offsets = scales + self.vectors * self.scales.units
        return 0, weights, scales, offsets, offsets + self.vectors * self.offsets.units

    @property
    def units(self) -> int:
        """Of all parts."""
        return self.begins[-1]

    @property
    def received_bytes(self) -> int:
        """What copies bring for a stage: all but the gaps between vectors."""
        return VECTOR * (self.units - self.vectors * (VECTOR_UNITS - PANEL))

    @property
    def count(self) -> int:
        """Stages in the ring."""
        return min(LARGEST_SHARED_BYTES // (VECTOR * self.units + BARRIER_BYTES), MOST_STAGES)

    @property
    def ring_bytes(self) -> int:
        """Of all stages, and of the barriers behind them."""
        return self.count * (VECTOR * self.units + BARRIER_BYTES)

    @property
    def fits(self) -> bool:
        """Whether shared memory has room for enough stages."""
        return self.count >= FEWEST_STAGES

    def vector(self, chunk: Any, panel: Any, v: Any) -> Any:
        """Number of vector v of a panel's chunk among the vectors of a stage."""
        return (chunk * PANELS + panel) * QUAD + v

    def row_unit(self, slot: Any, u: Any) -> Any:
        """Where pair u of the vectors of a stage begins, with that of the block's first row."""
        return slot * self.units + u * self.tiling.rows

    def weight_unit(self, slot: Any, e: Any) -> Any:
        """Where vector e begins, with that of its panel's first column."""
        return slot * self.units + self.begins[1] + e * VECTOR_UNITS

    def group_unit(self, groups: Groups, slot: Any, e: Any) -> Any:
        """Where the scales or offsets for that vector begin."""
        return slot * self.units + self.begins[2 if groups is self.scales else 3] + e * groups.units
