"""How keys and values are stored: the tensors of one cache, by the name that `quantize.cache` gives the format."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from runtime.artifact.targets import CacheDType

NumberDType = Literal["float32", "float16", "float8_e4m3fn", "int8", "uint8"]
FLOAT8: Final = "float8_e4m3fn"  # numpy and kernels take its bits, as uint8
ScaleDType = Literal["float32", "float16"]
GROUP = 32  # neighbours of an int4 column that share a scale and a minimum
RING_BLOCK = 16  # columns whose keys are interleaved, so that adjacent numbers belong to adjacent columns
HALF = GROUP // 2  # byte i of a group holds number i in its low four bits and number i + HALF in its high ones


@dataclass(frozen=True)
class CachePart:
    """One tensor (slots, n_kv_heads, columns, width) of the keys or of the values of a layer."""

    suffix: str  # of its name
    width: int
    dtype: NumberDType | ScaleDType


@dataclass(frozen=True)
class CacheFormat:
    """One way of storing a column: the key or the value of one head of one token."""

    dtype: NumberDType  # of the tensor that holds the numbers; no two formats have the same
    unit_roundoff: float  # largest error of a stored number, relative to the column's largest
    scales: ScaleDType | None = None  # dtype of scales (and minima); None if numbers are stored as they are
    group: int | None = None  # neighbours that share a scale and a minimum, two in a byte; None: a scale for a column

    def fits(self, head_dim: int) -> bool:
        """Whether columns of this size can be stored so."""
        return head_dim % (self.group or 1) == 0

    def parts(self, head_dim: int) -> Iterator[CachePart]:
        """The tensors of a cache, in order: the numbers, what they are multiplied by, and what is then added."""
        if self.scales is None:
            yield CachePart("", head_dim, self.dtype)
        elif self.group is None:
            yield CachePart("", head_dim, self.dtype)
            yield CachePart("_scale", 1, self.scales)
        else:
            yield CachePart("", head_dim // 2, self.dtype)
            yield CachePart("_scale", head_dim // self.group, self.scales)
            yield CachePart("_minimum", head_dim // self.group, self.scales)


CACHE_FORMATS: Mapping[CacheDType, CacheFormat] = {
    "fp32": CacheFormat("float32", 2.0**-24),
    "fp16": CacheFormat("float16", 2.0**-11),
    "fp8": CacheFormat(FLOAT8, 2.0**-4),  # of numbers from 2**-6 to 448; larger ones are stored as 448
    "int8": CacheFormat("int8", 0.5 / 127, scales="float32"),
    # half of a fifteenth of the range of a group, which is at most twice the column's largest number
    "int4": CacheFormat("uint8", 1 / 15, scales="float16", group=GROUP),
}
CACHE_NAMES: Mapping[str, CacheDType] = {stored.dtype: name for name, stored in CACHE_FORMATS.items()}


def cache_format(dtype: str) -> CacheFormat:
    """The format whose numbers have this dtype."""
    return CACHE_FORMATS[CACHE_NAMES[dtype]]
