"""Rows of x as pairs of float16, with RMSNorm and the order of the columns, laid out for products on tensor cores.

In `few_rows.py` a lane takes pairs of a vector, in `tile_ring.py` a matrix takes a pair of each of four vectors.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda.binding import WARP, Binding
from build.kernels.cuda.mma import QUAD, pair
from build.kernels.cuda.norm import inverse_rms, sum_squares
from build.kernels.cuda.pair_weights import WORDS, pair_steps, pairs_in_vector
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import vector_steps

THREADS = 256  # per block


@dataclass(frozen=True)
class Chunks:
    """How K is split: a chunk has four neighbouring vectors, one for each lane of a quad."""

    vectors: int  # of an output
    pairs: int  # in a vector

    @classmethod
    def of(cls, stored: Storage, k: int) -> "Chunks":
        """The split of a row of K numbers."""
        return cls(-(-k // vector_steps(stored)), pairs_in_vector(stored))

    @property
    def count(self) -> int:
        """Number of chunks, the last of which may not be full."""
        return -(-self.vectors // QUAD)

    @property
    def parts(self) -> int:
        """Loads of 16 bytes of x for a vector."""
        return self.pairs // WORDS

    def prepared(self, rows: int) -> tuple[int, ...]:
        """Shape of x as `rounded_rows` leaves it: (chunks, parts, rows, vectors of a chunk, pairs of a part).

        With `by_pairs`, the last two are the other way round.
        """
        return (self.count, self.parts, rows, QUAD, WORDS)


def rounded_rows(shape: Linear, chunks: Chunks, on: Binding, *, by_pairs: bool = False):
    """A launch, inline `prepare(x, gain, order, prepared)`: x, normed and in order, as pairs of float16.

    One block takes some pairs of a row; with a norm, all blocks of a row measure it.
    """
    rows, k, stored = shape.rows, shape.k, shape.weight
    steps, pairs = vector_steps(stored), chunks.count * QUAD * chunks.pairs  # in a row
    blocks = -(-pairs // (THREADS * WORDS))
    measure, inverse = sum_squares(k, THREADS, on), inverse_rms(k, shape.norm_eps or 0.0)

    def number(x, gain, order, i, step, factor):
        at = order[T.min(step, k - 1)] if stored.reordered else T.min(step, k - 1)
        found = x[i, at] if shape.norm_eps is None else x[i, at] * factor * gain[at]
        return T.if_then_else(step < k, found, T.float32(0))

    def both(x, gain, order, i, c, part, v, word, factor):
        """Pair `word` of part `part` of vector v of chunk c."""
        first = (c * QUAD + v) * steps
        return pair(
            *(number(x, gain, order, i, first + step, factor) for step in pair_steps(stored, part * WORDS + word))
        )

    @T.inline
    def store(x, gain, order, prepared, i, e, factor):
        """Pair e of row i, counted in the order of `Chunks.prepared`."""
        c = e // (chunks.parts * QUAD * WORDS)
        part = e // (QUAD * WORDS) % chunks.parts
        v, word = (e % QUAD, e // QUAD % WORDS) if by_pairs else (e // WORDS % QUAD, e % WORDS)
        prepared[c, part, i, e // WORDS % QUAD, e % WORDS] = both(x, gain, order, i, c, part, v, word, factor)

    @T.inline
    def prepare(x, gain, order, prepared):
        for block in on.blocks(rows * blocks):
            i = block // blocks
            squares = T.alloc_buffer((THREADS,), "float32", scope=on.shared)
            sums = T.alloc_buffer((WARP,), "float32", scope=on.shared)
            if shape.norm_eps is not None:
                measure(x, i, squares, sums)
            for t in on.threads(THREADS):
                factor = T.alloc_buffer((1,), "float32", scope=on.private)
                factor[0] = T.float32(1)
                if shape.norm_eps is not None:
                    factor[0] = inverse(sums)
                for c in on.unroll(WORDS):
                    e = (block % blocks * WORDS + c) * THREADS + t
                    if e < pairs:
                        store(x, gain, order, prepared, i, e, factor[0])

    return prepare


def product_of_rounded_rows(
    shape: Linear, chunks: Chunks, on: Binding, product: Callable[..., Any], *, by_pairs: bool = False
):
    """Body of `linear`: the launch of `rounded_rows`, then the inline `product(prepared, w, s, z, residual, y)`."""
    prepare = rounded_rows(shape, chunks, on, by_pairs=by_pairs)

    @T.inline
    def body(x, gain, w, s, z, order, residual, y):
        prepared = T.alloc_buffer(chunks.prepared(shape.rows), "uint32")
        prepare(x, gain, order, prepared)
        product(prepared, w, s, z, residual, y)

    return body
