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

from build.kernels.cuda import mma
from build.kernels.cuda.binding import Binding
from build.kernels.cuda.mma import QUAD
from build.kernels.cuda.pair_weights import WORDS, pair_reader
from build.kernels.cuda.rounded_rows import Chunks, Prepared
from build.kernels.cuda.tile_loads import Matrix
from build.kernels.cuda.warpgroups import cluster, wgmma
from build.kernels.cuda.warpgroups.copies import Memory, Source, in_shared, starting
from build.kernels.cuda.warpgroups.ring import BARRIER_BYTES, Stage
from build.kernels.cuda.warpgroups.tiling import THREADS, WarpgroupTiling
from export.weights.format import Storage
from runtime.artifact.layouts import VECTOR

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


def warpgroup_product(stored: Storage, n: int, k: int, tiling: WarpgroupTiling, on: Binding):
    """Inline `multiply(x, w, s, z, p, m, rank, split, acc)`: one block's sums.

    These are rows m .. m + tiling.rows of x, as `prepared_for` says, times the panels of w from p on, along part
    `split` of K; all parts have as many stages. `rank` is the block's number in its cluster. Each thread's sums are in
    acc where `wgmma.place` says. A scale per output is left to the caller; group scales are multiplied in.
    """
    stage, total = Stage.of(stored, tiling), stages_of(stored, k, tiling)
    count = total // tiling.splits  # stages of a split
    start = starting(stored, n, k, stage)
    start_products = step_product(stored, stage, on)

    @T.inline
    def multiply_stages(source, rank, memory, factors, acc, t):
        for i in T.serial(count):
            cluster.wait_for_copies(memory.barriers, i % stage.count, i // stage.count)
            for step in on.unroll(stage.steps):
                start_products(memory, i % stage.count, step, factors, acc, t)
                if step == 1:
                    cluster.wait()
                    if i + stage.count - 1 < count:
                        start(source, i + stage.count - 1, rank, memory, t)
                wgmma.wait(1)
                if step == 0:  # nothing of the stage before is multiplied any more
                    cluster.arrive()

    @T.inline
    def prepare_barriers(barriers, t):
        if t == 0:
            for i in on.unroll(stage.count):
                cluster.prepare_barrier(barriers, i)
            cluster.publish_barriers()
        cluster.rejoin()
        cluster.arrive()
        cluster.wait()

    @T.inline
    def multiply_tile(source, rank, memory, factors, acc, t):
        prepare_barriers(memory.barriers, t)
        for i in on.unroll(min(stage.count - 1, count)):
            start(source, i, rank, memory, t)
        for i in on.unroll(wgmma.sums(tiling.rows)):
            acc[0, i] = T.float32(0)
        multiply_stages(source, rank, memory, factors, acc, t)
        wgmma.wait(0)

    @T.inline
    def multiply(x_in, w_in, s_in, z_in, p, m, rank, split, acc):
        ring = T.alloc_buffer((stage.ring_bytes // 4,), "uint32", scope=on.large_shared)
        barriers = T.decl_buffer(
            (stage.count,), "uint64", data=ring.data, elem_offset=stage.count * stage.units * VECTOR // BARRIER_BYTES
        )
        in_ring = T.decl_buffer((stage.count * stage.units, WORDS), "uint32", data=ring.data)
        x = T.decl_buffer((total * stage.steps * WORDS, x_in.shape[3], QUAD), "uint32", data=x_in.data)
        w = T.decl_buffer((*w_in.shape[:3], WORDS), "uint32", data=w_in.data)
        words = T.alloc_buffer((1, wgmma.THREAD_ROWS * WORDS), "uint32", scope=on.private)
        scale = T.alloc_buffer((1, wgmma.THREAD_ROWS), stage.scales.dtype, scope=on.private)
        offset = T.alloc_buffer((1, wgmma.THREAD_ROWS), stage.offsets.dtype, scope=on.private)
        a = T.alloc_buffer((1, BUFFERS * 2 * mma.A), "uint32", scope=on.private)
        for t in on.threads(THREADS):
            multiply_tile(
                Source(x, m, Matrix(w, s_in, z_in, 0, p), split * count),
                rank,
                Memory(in_ring, in_shared(ring, stage, stage.scales), in_shared(ring, stage, stage.offsets), barriers),
                Factors(words, scale, offset, a),
                acc,
                t,
            )

    return multiply


class Factors(NamedTuple):
    """A thread's registers: of W as stored for a chunk, its groups' scales and offsets, and pairs for two steps."""

    words: Any
    scales: Any
    offsets: Any
    a: Any


def step_product(stored: Storage, stage: Stage, on: Binding):
    """Inline `start_products(memory, slot, step, factors, acc, t)`: start those of a step, as one group.

    Those of the step before may go on, but those before them must have ended, since the factors take their registers.
    """
    tiling, parts = stage.tiling, stage.parts
    read_pair, multiply = pair_reader(stored, on), wgmma.multiplier(tiling.rows)

    @T.inline
    def read_group(groups, numbers, slot, chunk, target, c, t):
        target[0, c] = numbers[
            stage.group_unit(groups, slot, stage.vector(chunk, tiling.own_panel(t, c), t % QUAD))
            + tiling.own_column(t, c) // groups.numbers,
            tiling.own_column(t, c) % groups.numbers,
        ]

    @T.inline
    def read_words(memory, slot, chunk, factors, c, t):
        some = T.alloc_buffer((WORDS,), "uint32", scope=on.private)
        for v in T.vectorized(WORDS):
            some[v] = memory.words[
                stage.weight_unit(slot, stage.vector(chunk, tiling.own_panel(t, c), t % QUAD))
                + tiling.own_column(t, c),
                v,
            ]
        for v in on.unroll(WORDS):
            factors.words[0, c * WORDS + v] = some[v]

    @T.inline
    def read_chunk(memory, slot, chunk, factors, t):
        for c in on.unroll(wgmma.THREAD_ROWS):
            read_words(memory, slot, chunk, factors, c, t)
            if stage.scales.exist:
                read_group(stage.scales, memory.scales, slot, chunk, factors.scales, c, t)
            if stage.offsets.exist:
                read_group(stage.offsets, memory.offsets, slot, chunk, factors.offsets, c, t)

    def pair(factors, part, j, i):
        """Pair i of a for product j of a step: of both columns first, then of the next word."""
        c, word = i % wgmma.THREAD_ROWS, part * WORDS + j * mma.B + i // wgmma.THREAD_ROWS
        scale = factors.scales[0, c] if stage.scales.exist else None
        offset = factors.offsets[0, c] if stage.offsets.exist else None
        return read_pair(lambda at: factors.words[0, c * WORDS + at], word, scale, offset)

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
    def start_products(memory, slot, step, factors, acc, t):
        if step % parts == 0:
            read_chunk(memory, slot, step // parts, factors, t)
        place(step, factors)
        wgmma.begin()
        for j in on.unroll(2):
            multiply(acc, factors.a, first(step, j), rows(memory, slot, step, j))
        wgmma.close()

    return start_products
