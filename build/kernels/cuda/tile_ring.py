"""What a block of a product on tensor cores keeps in shared memory: a ring of steps of x and W, as they are stored.

Copies from memory (`async_copy.py`) run `AHEAD` steps before the products. A step is 32 numbers of K: 64 bytes of each
row of x, in the order in which `rounded_rows.py` has left them. Of W, whose 16 bytes are 1, 2 or 4 steps, a chunk is
copied before its first step: four such vectors of each column, with the scales and offsets of the vectors' groups.

Shared memory has 128 bytes of banks, so that eight lanes, with 16 bytes each, can read at a time. Those that read x are
in eight rows, 64 bytes apart, and those that read W in four vectors of two columns, 512 bytes apart. An exclusive or
brings them to different banks. What reads and writes the ring is in `tile_loads.py`.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
from tvm.script import tirx as T

from build.kernels.cuda.mma import QUAD
from build.kernels.cuda.pair_weights import WORDS
from build.kernels.cuda.rounded_rows import Chunks
from build.kernels.cuda.tiling import Tiling
from build.kernels.cuda.weights import parts_of
from export.weights.format import Storage
from export.weights.table import vector_layout
from runtime.artifact.layouts import PANEL, VECTOR

AHEAD = 3  # steps for which copies have been started while one is multiplied
STEPS = AHEAD + 1  # of x in the ring
PANEL_VECTORS = QUAD * PANEL  # of W in a chunk of a panel


@dataclass(frozen=True)
class Groups:
    """Scales or offsets of groups in the ring: for each vector of W the numbers of its panel's 32 columns."""

    dtype: str
    exist: bool

    @property
    def numbers(self) -> int:
        """Numbers in 16 bytes."""
        return VECTOR // np.dtype(self.dtype).itemsize

    @property
    def units(self) -> int:
        """Units of 16 bytes for a vector."""
        return PANEL // self.numbers if self.exist else 0


def groups_of(stored: Storage) -> tuple[Groups, Groups]:
    """Scales and offsets of weights that are stored in this way."""
    parts = parts_of(vector_layout(stored, PANEL, stored.group_size or PANEL))
    return Groups(parts["s"][1], stored.grouped), Groups(parts["z"][1], stored.offsets != "none")


@dataclass(frozen=True)
class Ring:
    """Sizes of the ring, in units of 16 bytes."""

    tiling: Tiling
    parts: int  # steps in a chunk
    scales: Groups
    offsets: Groups

    @classmethod
    def of(cls, stored: Storage, tiling: Tiling) -> "Ring":
        """The ring for a product with such weights."""
        return cls(tiling, Chunks.of(stored, PANEL).parts, *groups_of(stored))

    @property
    def words(self) -> int:
        """Words of a vector of W that a step takes."""
        return WORDS // self.parts

    @property
    def chunks(self) -> int:
        """Chunks of W: one for each of `STEPS` steps in a row, wherever in a chunk these begin."""
        return -(-AHEAD // self.parts) + 1

    @property
    def row_units(self) -> int:
        """Of x in a step."""
        return self.tiling.rows * WORDS

    @property
    def weight_units(self) -> int:
        """Of W in a chunk."""
        return self.tiling.panels * PANEL_VECTORS

    def group_units(self, groups: Groups) -> int:
        """Of scales or offsets in a chunk."""
        return self.tiling.panels * QUAD * groups.units

    @property
    def begins(self) -> tuple[int, ...]:
        """Where rows, weights, their groups' scales and their offsets begin, and where the last of them end."""
        chunk = (self.weight_units, self.group_units(self.scales), self.group_units(self.offsets))
        return tuple(accumulate((0, STEPS * self.row_units, *(self.chunks * units for units in chunk))))

    @property
    def bytes(self) -> int:
        """Shared memory of a block."""
        return VECTOR * self.begins[-1]

    def row_unit(self, slot: Any, row: Any, word: Any) -> Any:
        """Where pair `word` of each of a row's four vectors lies."""
        return slot * self.row_units + row * WORDS + (word ^ (row // 2 % WORDS))

    def weight_unit(self, slot: Any, panel: Any, v: Any, column: Any) -> Any:
        """Where vector v of a panel's column lies."""
        return slot * self.weight_units + (panel * QUAD + v) * PANEL + (column ^ (2 * v))

    def group_unit(self, groups: Groups, slot: Any, panel: Any, v: Any, i: Any) -> Any:
        """Where unit i of the scales or offsets for vector v of a panel's columns lies."""
        return slot * self.group_units(groups) + (panel * QUAD + v) * groups.units + i


class Shared(NamedTuple):
    """The ring's memory: rows of x, weights, scales and offsets of groups; each (units, elements in 16 bytes)."""

    x: Any
    w: Any
    s: Any
    z: Any


def shared_parts(ring: Ring, memory: Any) -> Shared:
    """The parts of a ring's memory, all of which is one buffer; None in the place of what a format lacks."""

    def part(i: int, dtype: str, elements: int) -> Any:
        units = ring.begins[i + 1] - ring.begins[i]
        if units == 0:
            return None
        return T.decl_buffer((units, elements), dtype, data=memory.data, elem_offset=ring.begins[i] * elements)

    return Shared(
        part(0, "uint32", WORDS),
        part(1, "uint32", WORDS),
        part(2, ring.scales.dtype, ring.scales.numbers),
        part(3, ring.offsets.dtype, ring.offsets.numbers),
    )
