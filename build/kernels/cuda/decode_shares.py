"""How the columns that a row of one token sees are shared among blocks, and the heads of a group among them."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from tvm.script import tirx as T

from build.kernels.cuda.binding import WARP
from build.kernels.shapes import RollingAttention

TILE_KEYS = WARP  # columns that a block takes at once: a score for each lane of a warp


@dataclass(frozen=True)
class DecodeTuning:
    """What only a measurement decides.

    Measured on an H200, 2026-11-26, with 32 query heads, 8 key heads of 128, a cache of fp16 and 8192 visible columns:
    1, 2, 4 and 8 rows took 14.9, 26.4, 42.0 and 80.4 us with 264 blocks, 15.0, 29.4, 48.7 and 88.1 with 528, and 26.2,
    48.0, 70.5 and 117.5 with 1056.
    """

    blocks: int = 264  # for a row: two per multiprocessor of an H200
    heads: int = 4  # query heads of one block, at most


TUNING = DecodeTuning()


def heads_of_block(shape: RollingAttention) -> int:
    """Query heads, all of one key head, that a block serves; a wider group takes several blocks."""
    group = shape.n_heads // shape.n_kv_heads
    return next(n for n in range(min(group, TUNING.heads), 0, -1) if group % n == 0)


def splits(shape: RollingAttention) -> int:
    """Most blocks that share the columns that a row sees: as many as fill the device, but none without a tile.

    The number of rows has no part in it, so that a row's sums do not depend on it.
    """
    tiles = -(-shape.window // TILE_KEYS)
    return min(tiles, -(-TUNING.blocks // (shape.n_heads // heads_of_block(shape))))


class Visible(NamedTuple):
    """What a row sees: positions `oldest` .. end - 1, in `blocks` shares of `share` tiles each."""

    oldest: Any
    end: Any
    share: Any
    blocks: Any


def visible(shape: RollingAttention, position: Any) -> Visible:
    """The columns that a row at an int64 position sees, as TIR expressions; padding sees none, in no shares."""
    end = T.Cast("int32", position) + 1
    oldest = T.max(end - shape.window, 0)
    tiles = (end - oldest + TILE_KEYS - 1) // TILE_KEYS
    share = T.max((tiles + splits(shape) - 1) // splits(shape), 1)
    return Visible(oldest, end, share, (tiles + share - 1) // share)
