"""How x and W come to the ring in a block's shared memory (`ring.py`): copies that its threads start."""

from typing import Any, NamedTuple

from tvm.script import tirx as T

from build.kernels.cuda.binding import WARP
from build.kernels.cuda.mma import QUAD
from build.kernels.cuda.pair_weights import WORDS
from build.kernels.cuda.rounded_rows import Chunks
from build.kernels.cuda.tile_loads import Matrix
from build.kernels.cuda.tile_ring import Groups
from build.kernels.cuda.warpgroups import cluster
from build.kernels.cuda.warpgroups.ring import Stage
from build.kernels.cuda.warpgroups.tiling import PANELS, WARPS
from build.kernels.cuda.weights import group_of
from export.weights.format import Storage
from export.weights.table import vector_layout
from runtime.artifact.layouts import PANEL, VECTOR


class Memory(NamedTuple):
    """A block's shared memory: the ring in several dtypes, each (units, elements in 16 bytes), and its barriers."""

    words: Any
    scales: Any
    offsets: Any
    barriers: Any


class Source(NamedTuple):
    """What a block multiplies: x in units of 16 bytes, its first row, W, and the first stage of its part of K."""

    x: Any  # (units of a row, rows, QUAD)
    m: Any
    matrix: Matrix
    first: Any


def in_shared(ring: Any, stage: Stage, groups: Groups) -> Any:
    """The ring as scales or offsets, or None where a format has none."""
    if not groups.exist:
        return None
    return T.decl_buffer((stage.count * stage.units, groups.numbers), groups.dtype, data=ring.data)


def starting(stored: Storage, n: int, k: int, stage: Stage):
    """Inline `start(source, i, rank, memory, t)`: some lanes of each warp start the copies of stage i.

    Of x, a block copies one unit in as many as its cluster has blocks, for all of them. A lane starts one copy at a
    time, and the lanes of a warp one after the other, so that all warps take part. In the place of what lies beyond W,
    they copy something within it: there, x is zero, or nobody stores the sums.
    """
    tiling = stage.tiling
    panels, vectors = vector_layout(stored, n, k).shape[0], Chunks.of(stored, k).vectors
    unit_lanes, vector_lanes = stage.steps * WORDS // WARPS, stage.vectors // WARPS  # of each warp

    def slot(i: Any) -> Any:
        return i % stage.count

    def address(memory: Memory, unit: Any) -> Any:
        return T.cuda.cvta_generic_to_shared(T.address_of(memory.words[unit, 0]))

    def panel(matrix: Matrix, e: Any) -> Any:
        """Panel of the matrix that vector e of a stage belongs to."""
        return T.min(tiling.panel(matrix.p, e // QUAD % PANELS, panels // 2), panels - 1)

    def vector(source: Source, i: Any, e: Any) -> Any:
        """Which of the panel's vectors it is."""
        return T.min(((source.first + i) * stage.chunks + e // (PANELS * QUAD)) * QUAD + e % QUAD, vectors - 1)

    @T.inline
    def start_rows(source, i, memory, u):
        cluster.copy_to_all(
            T.address_of(source.x[(source.first + i) * stage.steps * WORDS + u, source.m, 0]),
            address(memory, stage.row_unit(slot(i), u)),
            tiling.rows * VECTOR,
            memory.barriers,
            slot(i),
            tiling.cluster,
        )

    @T.inline
    def start_vector(source, i, memory, e):
        cluster.copy_to_own(
            T.address_of(source.matrix.w[panel(source.matrix, e), vector(source, i, e), 0, 0]),
            address(memory, stage.weight_unit(slot(i), e)),
            PANEL * VECTOR,
            memory.barriers,
            slot(i),
        )

    @T.inline
    def start_group(groups, numbers, source, i, memory, e):
        cluster.copy_to_own(
            T.address_of(numbers[panel(source.matrix, e), group_of(stored, vector(source, i, e)), 0]),
            address(memory, stage.group_unit(groups, slot(i), e)),
            groups.units * VECTOR,
            memory.barriers,
            slot(i),
        )

    @T.inline
    def start_column(source, i, memory, e):
        """Vector e of the stage, with its scales and offsets."""
        start_vector(source, i, memory, e)
        if stage.scales.exist:
            start_group(stage.scales, source.matrix.s, source, i, memory, e)
        if stage.offsets.exist:
            start_group(stage.offsets, source.matrix.z, source, i, memory, e)

    @T.inline
    def start(source, i, rank, memory, t):
        if t == 0:
            cluster.expect(memory.barriers, slot(i), stage.received_bytes)
        if t % WARP < unit_lanes and (t // WARP * unit_lanes + t % WARP) % tiling.cluster == rank:
            start_rows(source, i, memory, t // WARP * unit_lanes + t % WARP)
        if t % WARP < vector_lanes:
            start_column(source, i, memory, t // WARP * vector_lanes + t % WARP)
        cluster.rejoin()

    return start
