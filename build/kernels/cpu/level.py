"""CPU levels: the width and number of registers, and hence the tile of outputs that a matrix product keeps in them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from build.kernels.cpu.dot import (
    AVX2_DOT,
    AVX2_WIDE_WORDS,
    AVX2_WORDS,
    AVX_VNNI_DOT,
    AVX_VNNI_WIDE_DOT,
    VNNI_DOT,
    VNNI_WIDE_DOT,
    Dot,
    WordDot,
)
from build.kernels.cpu.pair_dot import AVX512_PAIR_DOT, PairDot
from runtime.artifact.layouts import PANEL
from runtime.artifact.schemes import Rounding
from runtime.engines.cpu_level import usable_features

FEW_TILES = 3  # tiles of rows up to which reading weights takes about as long as multiplying them


@dataclass(frozen=True)
class Tile:
    """`rows` x `columns` sums of a matrix product, which stay in registers."""

    rows: int
    columns: int


@dataclass(frozen=True)
class Level:
    """Facts about a processor that the kernels depend on."""

    name: str
    # LLVM's name of the least capable processor that has all flags, and behind commas attributes that change how code
    # for it is generated.
    processor: str
    flags: tuple[str, ...]  # of /proc/cpuinfo, that a processor must have for this level
    lanes: int  # float32 numbers in a vector register
    tile: Tile
    dots: Mapping[Rounding, Dot] = field(default_factory=dict)  # by the rounding of activations
    words: Mapping[Rounding, WordDot] = field(default_factory=dict)  # for int4, where this is faster than `dots`
    amx_rows: int | None = None  # from which number of rows on tiles of AMX multiply whole numbers, if it has them
    pair_dots: Mapping[Rounding, PairDot] = field(default_factory=dict)  # for bfloat16, by the rounding of activations
    pair_tiles: bool = False  # whether tiles of AMX multiply bfloat16 by activations that are rounded to it

    @property
    def cpu(self) -> str:
        """LLVM's name of the processor alone."""
        return self.processor.partition(",")[0]

    @property
    def attributes(self) -> list[str]:
        """LLVM's attributes behind it."""
        return self.processor.split(",")[1:]


# AVX2 has 16 registers: 6 x 16 sums take 12, weights 2 and a number of x 1.
# AVX-512 has 32: 12 x 32 sums take 24, weights 2 and a number of x 1.
# A level's code may use only instructions that its flags promise. For some processors LLVM would cut vectors of 512
# bits in halves, because early ones slowed down with them.
_AVX2 = ("avx2", "fma")
_AVX512 = (*_AVX2, "avx512f", "avx512bw", "avx512dq", "avx512vl")
_SMALL, _LARGE = Tile(rows=6, columns=16), Tile(rows=12, columns=32)
AVX2: Mapping[Rounding, Dot] = {"int8": AVX2_DOT, "int16": AVX2_DOT}
WORDS: Mapping[Rounding, WordDot] = {"int8": AVX2_WORDS, "int16": AVX2_WIDE_WORDS}
VNNI: Mapping[Rounding, Dot] = {"int8": VNNI_DOT, "int16": VNNI_WIDE_DOT}
AVX_VNNI: Mapping[Rounding, Dot] = {"int8": AVX_VNNI_DOT, "int16": AVX_VNNI_WIDE_DOT}
_VNNI512 = (*_AVX512, "avx512_vnni")
PAIRS: Mapping[Rounding, PairDot] = {"bfloat16": AVX512_PAIR_DOT}
_BF16 = (*_VNNI512, "avx512_bf16")
_AMX = (*_BF16, "amx_tile", "amx_int8", "amx_bf16")
LEVELS: tuple[Level, ...] = (  # best first
    Level(
        "amx",
        "sapphirerapids,-prefer-256-bit",
        _AMX,
        lanes=16,
        tile=_LARGE,
        dots=VNNI,
        amx_rows=16,
        pair_tiles=True,
    ),
    Level(
        "avx512-bf16",
        "cooperlake,-prefer-256-bit",
        _BF16,
        lanes=16,
        tile=_LARGE,
        dots=VNNI,
        pair_dots=PAIRS,
    ),
    Level("avx512-vnni", "cascadelake,-prefer-256-bit", _VNNI512, lanes=16, tile=_LARGE, dots=VNNI),
    Level("avx512", "x86-64-v4,-prefer-256-bit", _AVX512, lanes=16, tile=_LARGE, dots=AVX2, words=WORDS),
    Level("avx-vnni", "alderlake", (*_AVX2, "avx_vnni"), lanes=8, tile=_SMALL, dots=AVX_VNNI),
    Level("avx2", "x86-64-v3", _AVX2, lanes=8, tile=_SMALL, dots=AVX2, words=WORDS),
    Level("any", "x86-64", (), lanes=8, tile=_SMALL),  # the compiler splits its vectors
)


def level_of(cpu_features: Iterable[str]) -> Level:
    """The best level that code for a CPU with these /proc/cpuinfo flags may use."""
    have = frozenset(cpu_features)
    return next(level for level in LEVELS if have.issuperset(level.flags))


def runnable_levels() -> tuple[Level, ...]:
    """The levels whose code this machine can run, best first."""
    have = usable_features()
    return tuple(level for level in LEVELS if have.issuperset(level.flags))


def fitting_lanes(level: Level, size: int) -> int:
    """Lanes of the widest vector, a power of two, that divides `size`."""
    return next(n for n in (16, 8, 4, 2, 1) if n <= level.lanes and size % n == 0)


def balanced_rows(rows: int, most: int) -> int:
    """Rows of a tile if `rows` are cut into as few tiles of at most `most` rows as possible, of equal sizes."""
    return -(-rows // -(-rows // most))


def sums_beside_prefetches(level: Level) -> int:
    """Vectors of sums that stay in registers in a loop that also prefetches, beside weights and x.

    They must be fewer than 1024 bytes, for TVM takes more from the heap, and to LLVM, a prefetch may change those.
    """
    return min(level.tile.rows * level.tile.columns // level.lanes, (1024 - 1) // (4 * level.lanes))


def tile_columns(level: Level, rows: int) -> int:
    """As many columns of a panel as leave `rows` sums for each of them in registers, beside prefetches."""
    most = sums_beside_prefetches(level) * level.lanes // rows
    return next(n for n in (PANEL, PANEL // 2, level.lanes) if n <= max(most, level.lanes))
