"""Rows of x as pairs of float16, with RMSNorm and the order of the columns, laid out for products on tensor cores."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tvm.script import tirx as T

from build.kernels.cuda.binding import WARP, Binding
from build.kernels.cuda.mma import QUAD, pair
from build.kernels.cuda.norm import inverse_rms, sum_squares
from build.kernels.cuda.pair_weights import WORDS, pair_steps, pairs_in_vector
from build.kernels.shapes import Linear
from export.weights.format import Storage
from export.weights.table import vector_steps

THREADS = 256  # per block
PART_PAIRS = QUAD * WORDS  # in a part of a chunk


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


@dataclass(frozen=True)
class Prepared:
    """How `rounded_rows` leaves x: so many chunks, each of so many parts, and rows.

    Rows beyond those of x repeat its last one. What follows a chunk, a part and a row is, by `inner`:

    - "vectors": the pairs of one vector, then of the next, as a lane of `few_rows.py` takes them;
    - "pairs": a pair of each of the four vectors, then the next of each, as a matrix of `tile_ring.py` takes them;
    - "units": the same, but a pair of each vector, 16 bytes, lies next to the next row's, as in `warpgroups/wgmma.py`.
    """

    chunks: int
    parts: int
    rows: int
    inner: Literal["vectors", "pairs", "units"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the buffer, in pairs."""
        if self.inner == "units":
            return (self.chunks, self.parts, WORDS, self.rows, QUAD)
        return (self.chunks, self.parts, self.rows, WORDS, QUAD)

    def vector_and_word(self, e: Any) -> tuple[Any, Any]:
        """Vector and word of pair e of a part, counted as they lie in memory."""
        return (e // WORDS, e % WORDS) if self.inner == "vectors" else (e % QUAD, e // QUAD)

    def place(self, c: Any, part: Any, i: Any, e: Any) -> tuple[Any, ...]:
        """Where pair e of a part of chunk c of row i lies."""
        return (c, part, e // QUAD, i, e % QUAD) if self.inner == "units" else (c, part, i, e // QUAD, e % QUAD)


def rounded_rows(shape: Linear, prepared_as: Prepared, on: Binding):
    """A launch, inline `prepare(x, gain, order, prepared)`: x, normed and in order, as pairs of float16.

    One block takes some pairs of a row; with a norm, all blocks of a row measure it.
    """
    k, stored, parts = shape.k, shape.weight, prepared_as.parts
    steps, pairs = vector_steps(stored), prepared_as.chunks * parts * PART_PAIRS  # in a row
    blocks = -(-pairs // (THREADS * WORDS))
    measure, inverse = sum_squares(k, THREADS, on), inverse_rms(k, shape.norm_eps or 0.0)

    def number(x, gain, order, i, step, factor):
        at = order[T.min(step, k - 1)] if stored.reordered else T.min(step, k - 1)
        i = i if prepared_as.rows == shape.rows else T.min(i, shape.rows - 1)
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
        """Pair e of row i."""
        c = e // (parts * PART_PAIRS)
        part = e // PART_PAIRS % parts
        v, word = prepared_as.vector_and_word(e % PART_PAIRS)
        prepared[prepared_as.place(c, part, i, e % PART_PAIRS)] = both(x, gain, order, i, c, part, v, word, factor)

    @T.inline
    def prepare(x, gain, order, prepared):
        for block in on.blocks(prepared_as.rows * blocks):
            i = block // blocks
            squares = T.alloc_buffer((THREADS,), "float32", scope=on.shared)
            sums = T.alloc_buffer((WARP,), "float32", scope=on.shared)
            if shape.norm_eps is not None:
                measure(x, T.min(i, shape.rows - 1), squares, sums)
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


def product_of_rounded_rows(shape: Linear, prepared_as: Prepared, on: Binding, product: Callable[..., Any]):
    """Body of `linear`: the launch of `rounded_rows`, then the inline `product(prepared, w, s, z, residual, y)`."""
    prepare = rounded_rows(shape, prepared_as, on)

    @T.inline
    def body(x, gain, w, s, z, order, residual, y):
        prepared = T.alloc_buffer(prepared_as.shape, "uint32")
        prepare(x, gain, order, prepared)
        product(prepared, w, s, z, residual, y)

    return body
