"""One block's part of a product on the tensor cores of sm_90a: all columns of a tile of W times some rows of x.

A ring in shared memory is filled by the tensor memory accelerator, x for a whole cluster of blocks (`cluster.py`). A
thread makes float16 of its numbers of W in registers, as `tile_product.py` does, and these are one factor of `wgmma`,
which reads the other, x, from shared memory by itself (`wgmma.py`). It multiplies a step while the threads widen W for
the next one, in other registers.

A block is done with a stage once the first products of the next one have been started and those before have ended. It
tells the cluster so, starts the next products, and only then waits for the other blocks, to fill that stage again. That
they have come to the last stage means that they have received all copies, so that a block may end.
"""

from typing import Any, NamedTuple

from tvm.script import tirx as T

from build.kernels.cuda import cluster, mma, wgmma
from build.kernels.cuda.binding import WARP, Binding
from build.kernels.cuda.mma import QUAD
from build.kernels.cuda.pair_weights import WORDS, pair_reader
from build.kernels.cuda.rounded_rows import Chunks, Prepared
from build.kernels.cuda.tile_loads import Matrix
from build.kernels.cuda.tile_ring import Groups
from build.kernels.cuda.warpgroup_ring import Stage
from build.kernels.cuda.warpgroup_tiling import PANELS, THREADS, WARPS, WarpgroupTiling
from build.kernels.cuda.weights import group_of
from export.weights.format import Storage
from export.weights.table import vector_layout
from runtime.artifact.layouts import PANEL, VECTOR

HALVES = 2  # of a thread's columns: 8 apart among the 16 of its warp
BUFFERS = 2  # of a thread's factors: one is multiplied while the other is written


def stages_of(stored: Storage, k: int, tiling: WarpgroupTiling) -> int:
    """Stages of all of K."""
    return -(-Chunks.of(stored, k).count // Stage.of(stored, tiling).chunks)


def prepared_for(stored: Storage, rows: int, k: int, tiling: WarpgroupTiling) -> Prepared:
    """How x has to lie in memory."""
    stage = Stage.of(stored, tiling)
    return Prepared(
        stages_of(stored, k, tiling) * stage.chunks, stage.parts, tiling.row_blocks(rows) * tiling.rows, "units"
    )


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


def warpgroup_product(stored: Storage, n: int, k: int, tiling: WarpgroupTiling, on: Binding):
    """Inline `multiply(x, w, s, z, p, m, rank, split, acc)`: one block's sums.

    These are rows m .. m + tiling.rows of x, as `prepared_for` says, times the panels of w from p on, along part
    `split` of K. `rank` is the block's number in its cluster. Each thread's sums are in acc where `wgmma.place` says.
    A scale per output is left to the caller; group scales are multiplied in.
    """
    stage, total = Stage.of(stored, tiling), stages_of(stored, k, tiling)
    each = -(-total // tiling.splits)  # stages of a split
    start = starting(stored, n, k, stage)
    multiply_step = step_product(stored, stage, on)

    @T.inline
    def multiply_stages(source, rank, count, memory, factors, acc, t):
        for i in T.serial(count):
            cluster.wait_for_copies(memory.barriers, i % stage.count, i // stage.count)
            for step in on.unroll(stage.steps):
                multiply_step(memory, i % stage.count, step, factors, acc, t)
                if step == 0:
                    cluster.arrive()
                if step == 1:
                    cluster.wait()
                    if i + stage.count - 1 < count:
                        start(source, i + stage.count - 1, rank, memory, t)

    @T.inline
    def prepare_barriers(barriers, t):
        if t == 0:
            for i in on.unroll(stage.count):
                cluster.prepare_barrier(barriers, i)
            cluster.publish_barriers()
        cluster.rejoin()
        cluster.arrive_with_writes()
        cluster.wait()

    @T.inline
    def multiply_tile(source, rank, count, memory, factors, acc, t):
        prepare_barriers(memory.barriers, t)
        for i in on.unroll(stage.count - 1):
            if i < count:
                start(source, i, rank, memory, t)
        for i in on.unroll(wgmma.sums(tiling.rows)):
            acc[0, i] = T.float32(0)
        multiply_stages(source, rank, count, memory, factors, acc, t)
        wgmma.wait(0)

    @T.inline
    def multiply(x_in, w_in, s_in, z_in, p, m, rank, split, acc):
        ring = T.alloc_buffer((stage.count * stage.units * WORDS,), "uint32", scope=on.large_shared)
        barriers = T.alloc_buffer((stage.count,), "uint64", scope=on.shared)
        in_ring = T.decl_buffer((stage.count * stage.units, WORDS), "uint32", data=ring.data)
        x = T.decl_buffer((total * stage.steps * WORDS, x_in.shape[3], QUAD), "uint32", data=x_in.data)
        w = T.decl_buffer((*w_in.shape[:3], WORDS), "uint32", data=w_in.data)
        words = T.alloc_buffer((1, HALVES * WORDS), "uint32", scope=on.private)
        scale = T.alloc_buffer((1, HALVES), stage.scales.dtype, scope=on.private)
        offset = T.alloc_buffer((1, HALVES), stage.offsets.dtype, scope=on.private)
        a = T.alloc_buffer((1, BUFFERS * 2 * mma.A), "uint32", scope=on.private)
        for t in on.threads(THREADS):
            multiply_tile(
                Source(x, m, Matrix(w, s_in, z_in, 0, p), split * each),
                rank,
                T.min(each, total - split * each),
                Memory(in_ring, in_shared(ring, stage, stage.scales), in_shared(ring, stage, stage.offsets), barriers),
                Factors(words, scale, offset, a),
                acc,
                t,
            )

    return multiply


def in_shared(ring: Any, stage: Stage, groups: Groups) -> Any:
    """The ring as scales or offsets, or None where a format has none."""
    if not groups.exist:
        return None
    return T.decl_buffer((stage.count * stage.units, groups.numbers), groups.dtype, data=ring.data)


def starting(stored: Storage, n: int, k: int, stage: Stage):
    """Inline `start(source, i, rank, memory, t)`: some lanes of each warp start the copies of stage i.

    A lane starts one copy at a time, and the lanes of a warp one after the other, so that all warps take part. In the
    place of what lies beyond W, they copy something within it: there, x is zero, or nobody stores the sums.
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
    def start_rows(source, i, rank, memory, u):
        cluster.copy_to_all(
            T.address_of(
                source.x[(source.first + i) * stage.steps * WORDS + u, source.m + rank * tiling.shared_rows, 0]
            ),
            address(memory, stage.row_unit(slot(i), u) + rank * tiling.shared_rows),
            tiling.shared_rows * VECTOR,
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
        if t % WARP < unit_lanes:
            start_rows(source, i, rank, memory, t // WARP * unit_lanes + t % WARP)
        if t % WARP < vector_lanes:
            start_column(source, i, memory, t // WARP * vector_lanes + t % WARP)
        cluster.rejoin()

    return start


class Factors(NamedTuple):
    """A thread's registers: of W as stored for a chunk, its groups' scales and offsets, and pairs for two steps."""

    words: Any
    scales: Any
    offsets: Any
    a: Any


def step_product(stored: Storage, stage: Stage, on: Binding):
    """Inline `multiply_step(memory, slot, step, factors, acc, t)`: start a step's products when those before the last
    step's have ended, of which one buffer of factors was a part."""
    tiling, parts = stage.tiling, stage.parts
    read_pair, multiply = pair_reader(stored, on), wgmma.multiplier(tiling.rows)

    @T.inline
    def read_group(groups, numbers, slot, chunk, target, h, t):
        target[0, h] = numbers[
            stage.group_unit(groups, slot, stage.vector(chunk, tiling.own_panel(t, h), t % QUAD))
            + tiling.own_column(t, h) // groups.numbers,
            tiling.own_column(t, h) % groups.numbers,
        ]

    @T.inline
    def read_words(memory, slot, chunk, factors, h, t):
        some = T.alloc_buffer((WORDS,), "uint32", scope=on.private)
        for v in T.vectorized(WORDS):
            some[v] = memory.words[
                stage.weight_unit(slot, stage.vector(chunk, tiling.own_panel(t, h), t % QUAD))
                + tiling.own_column(t, h),
                v,
            ]
        for v in on.unroll(WORDS):
            factors.words[0, h * WORDS + v] = some[v]

    @T.inline
    def read_chunk(memory, slot, chunk, factors, t):
        for h in on.unroll(HALVES):
            read_words(memory, slot, chunk, factors, h, t)
            if stage.scales.exist:
                read_group(stage.scales, memory.scales, slot, chunk, factors.scales, h, t)
            if stage.offsets.exist:
                read_group(stage.offsets, memory.offsets, slot, chunk, factors.offsets, h, t)

    def pair(factors, part, j, i):
        """Pair i of a for product j of a step: columns 8 apart first, then words."""
        h = i % HALVES
        scale = factors.scales[0, h] if stage.scales.exist else None
        offset = factors.offsets[0, h] if stage.offsets.exist else None
        return read_pair(
            lambda word: factors.words[0, h * WORDS + word], part * WORDS + j * mma.B + i // HALVES, scale, offset
        )

    def first(step: int, j: int) -> int:
        """Where the factor of product j of a step begins."""
        return (step % BUFFERS * 2 + j) * mma.A

    @T.inline
    def place(step, factors):
        for j in on.unroll(2):
            for i in on.unroll(mma.A):
                factors.a[0, first(step, j) + i] = pair(factors, step % parts, j, i)

    def rows(memory, slot, step, j):
        address = T.cuda.cvta_generic_to_shared(
            T.address_of(memory.words[stage.row_unit(slot, step * WORDS + j * mma.B), 0])
        )
        return wgmma.factor(address, tiling.rows)

    @T.inline
    def multiply_step(memory, slot, step, factors, acc, t):
        if step % parts == 0:
            read_chunk(memory, slot, step // parts, factors, t)
        place(step, factors)
        wgmma.begin()
        for j in on.unroll(2):
            multiply(acc, factors.a, first(step, j), rows(memory, slot, step, j))
        wgmma.close()
        wgmma.wait(1)

    return multiply_step
