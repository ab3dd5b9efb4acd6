"""Products of bfloat16 with activations that are rounded to it, in AMX's tiles, for any number of rows.

Two steps of 16 outputs are a row of a tile of weights, so that half a panel is a column of such tiles as it lies. x is
packed as for `pair_rows`. A product of tiles adds up the even and the odd ones of its 32 steps by themselves, and then
both and the sums (Intel, "Instruction Set Reference", TDPBF16PS): no other instruction sums in that order, so that one
row is a tile as well. It is as fast as memory is.
"""

from dataclasses import dataclass

from tvm.script import tirx as T

from build.kernels.cpu.amx import (
    TILE_BYTES,
    TILE_ROWS,
    clear_tile,
    configured,
    load_tile,
    multiply_bfloat16_tiles,
    release,
    store_tile,
)
from build.kernels.cpu.epilogue import panel_outputs
from build.kernels.cpu.level import Level, balanced_rows
from build.kernels.cpu.pair_rows import packed_pairs, packed_width
from build.kernels.cpu.panels import as_read
from build.kernels.cpu.vector import AHEAD, LINE, prefetch
from build.kernels.shapes import Linear
from runtime.artifact.layouts import PAIR, PANEL

WORDS = TILE_BYTES // 4  # in a row of a tile: pairs of x or of weights, or sums
HALVES = PANEL // WORDS  # tiles side by side in a panel
AT_ONCE = 2  # tiles of rows that are multiplied at a time
WEIGHTS, X, SUMS = 0, HALVES, HALVES + AT_ONCE  # the first tile of each kind; of sums, there are HALVES for each of x
PANEL_BYTES = PANEL * 4  # of one pair of steps


@dataclass(frozen=True)
class PairTiles:
    """How a product is cut into tiles: `tiles` of `rows` rows each; `blocks` of WORDS pairs, `whole` of them full."""

    rows: int
    tiles: int
    blocks: int
    whole: int
    width: int  # words of a row of packed x

    @classmethod
    def of(cls, shape: Linear) -> "PairTiles":
        """The fewest tiles, of equal sizes."""
        rows = balanced_rows(shape.rows, TILE_ROWS)
        pairs = -(-shape.k // PAIR)
        return cls(rows, -(-shape.rows // rows), -(-pairs // WORDS), pairs // WORDS, packed_width(shape.k))


def pair_tile_rows(level: Level, shape: Linear):
    """Body of `linear` by tiles of pairs."""
    cut = PairTiles.of(shape)
    all_rows, panels = cut.tiles * cut.rows, -(-shape.n_out // PANEL)
    compute, pack = panel_outputs(level, shape, all_rows, _tile_product(level, shape, cut)), packed_pairs(level, shape)
    loop = T.parallel if shape.rows > 1 else T.serial

    @T.inline
    def body(x_rows, gain, order, w, s, z, residual, y):  # noqa: ARG001
        x = T.alloc_buffer((all_rows, cut.width), "uint32")
        for i in loop(all_rows):
            pack(x_rows, gain, order, i, x)
        for p in T.parallel(panels):
            compute(p, residual, y, s, x, w)

    return body


def _tile_product(level: Level, shape: Linear, cut: PairTiles):
    """Inline `product(p, total, x, w)`: set total (tiles, R, PANEL) to x times panel p.

    Sums past N are garbage, but cause no faults.
    """
    x_tile, weights, sums = (cut.rows, TILE_BYTES), (WORDS, TILE_BYTES), (cut.rows, TILE_BYTES)
    configure = configured((*[weights] * HALVES, *[x_tile] * AT_ONCE, *[sums] * (HALVES * AT_ONCE)))
    pad = _padded_block(level, -(-shape.k // PAIR) - cut.whole * WORDS)
    multiply, multiply_last = _multiplied_tiles(cut, AT_ONCE), _multiplied_tiles(cut, 1)

    @T.inline
    def product(p, total, x, w):
        kept = as_read(w)
        rest = T.alloc_buffer((1, WORDS, PANEL), "uint32")
        if cut.blocks > cut.whole:
            pad(kept, p, cut.whole * WORDS, rest)
        configure()
        for n in T.serial(cut.tiles // AT_ONCE):
            multiply(p, total, x, kept, rest, n * AT_ONCE)
        if cut.tiles % AT_ONCE > 0:
            multiply_last(p, total, x, kept, rest, cut.tiles - 1)
        release()

    return product


def _padded_block(level: Level, count: int):
    """Inline `pad(w, p, first, block)`: set block (1, WORDS, PANEL) to `count` pairs of panel p, then zeros."""
    lanes = level.lanes

    @T.inline
    def pad(w, p, first, block):
        for d in T.unroll(WORDS):
            for i in T.unroll(PANEL // lanes):
                for v in T.vectorized(lanes):
                    block[0, d, i * lanes + v] = w[p, first + d, i * lanes + v] if d < count else T.uint32(0)

    return pad


def _multiplied_tiles(cut: PairTiles, count: int):
    """Inline `multiply(p, total, x, w, rest, m)`: set `count` tiles of total, from number m on, to x times panel p.

    `rest` are the weights of the last block, if it is not full. A panel that is multiplied with only these tiles comes
    from memory, and is prefetched.
    """
    fetches = cut.tiles <= count

    @T.inline
    def add_block(x, m, block, weights, panel, first):
        for half in T.unroll(HALVES):
            load_tile(WEIGHTS + half, weights, (panel, first, half * WORDS), PANEL_BYTES)
        for a in T.unroll(count):
            load_tile(X + a, x, ((m + a) * cut.rows, block * WORDS), cut.width * 4)
        for a in T.unroll(count):
            for half in T.unroll(HALVES):
                multiply_bfloat16_tiles(SUMS + a * HALVES + half, X + a, WEIGHTS + half)

    @T.inline
    def multiply(p, total, x, w, rest, m):
        for i in T.unroll(count * HALVES):
            clear_tile(SUMS + i)
        for block in T.serial(cut.whole):
            if fetches:
                for pair in T.unroll(WORDS):
                    for line in T.unroll(PANEL_BYTES // LINE):
                        prefetch(w, p, block * WORDS + pair + AHEAD // PANEL_BYTES, line * LINE // 4)
            add_block(x, m, block, w, p, block * WORDS)
        if cut.blocks > cut.whole:
            add_block(x, m, cut.whole, rest, 0, 0)
        for i in T.unroll(count * HALVES):
            store_tile(SUMS + i, total, (m + i // HALVES) * cut.rows * PANEL + i % HALVES * WORDS, PANEL_BYTES)

    return multiply
