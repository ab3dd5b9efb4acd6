"""The blocks of GGUF's quantized types, taken apart into whole numbers, scales and minimums that keep every value.

Layouts and formulas: `dequantize_blocks` of each type in the package gguf, and ggml-quants.c of llama.cpp. Scales are
products of at most 19 bits, which float32 holds exactly. Where a type has a table of values, these are the
numbers.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.checkpoints.encodings.encoding import EncodedRows, Encoding

Bytes = NDArray[np.uint8]
Float32 = NDArray[np.float32]
# Numbers (blocks, numbers), scales (blocks, groups), and minimums (blocks, groups) or None.
Parts = tuple[NDArray[np.uint8] | NDArray[np.int8], NDArray[np.floating], NDArray[np.floating] | None]
Unpack = Callable[[Bytes], Parts]  # takes blocks (blocks, bytes)

HALF = 2  # bytes of a float16
IQ4_VALUES = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.int8)
FP4_VALUES = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # e2m1, doubled


def _split(blocks: Bytes, *sizes: int) -> list[Bytes]:
    """The fields of every block; what is left comes last."""
    return np.split(blocks, np.cumsum(sizes), axis=1)


def _half(field: Bytes) -> NDArray[np.float16]:
    return np.ascontiguousarray(field).view(np.float16)


def _wide(field: Bytes) -> Float32:
    return _half(field).astype(np.float32)


def _halves(field: Bytes, run: int) -> Bytes:
    """Numbers of 4 bits: of each `run` bytes first the lower halves, then the upper ones."""
    return _fields(field, run, (0, 4), 15)


def _fields(field: Bytes, run: int, shifts: tuple[int, ...], mask: int) -> Bytes:
    """Numbers of a few bits: of each `run` bytes those at the first shift, then those at the next."""
    runs = field.reshape(len(field), -1, 1, run) >> np.array(shifts, np.uint8).reshape(1, 1, -1, 1)
    return (runs & np.uint8(mask)).reshape(len(field), -1)


def _fifth_bits(field: Bytes) -> Bytes:
    """Bit 4 of 32 numbers, in their place."""
    return np.unpackbits(field, axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes) -> Parts:
    scale, numbers = _split(blocks, HALF)
    return _halves(numbers, 16), _half(scale), None


def _q4_1(blocks: Bytes) -> Parts:
    scale, minimum, numbers = _split(blocks, HALF, HALF)
    return _halves(numbers, 16), _half(scale), _half(minimum)


def _q5_0(blocks: Bytes) -> Parts:
    scale, high, low = _split(blocks, HALF, 4)
    return (_halves(low, 16) | _fifth_bits(high)).astype(np.int8) - np.int8(16), _half(scale), None


def _q5_1(blocks: Bytes) -> Parts:
    scale, minimum, high, low = _split(blocks, HALF, HALF, 4)
    return (_halves(low, 16) | _fifth_bits(high)).astype(np.int8), _half(scale), _half(minimum)


def _q8_0(blocks: Bytes) -> Parts:
    scale, numbers = _split(blocks, HALF)
    return numbers.view(np.int8), _half(scale), None


def _iq4_nl(blocks: Bytes) -> Parts:
    scale, numbers = _split(blocks, HALF)
    return IQ4_VALUES[_halves(numbers, 16)], _half(scale), None


def _mxfp4(blocks: Bytes) -> Parts:
    """The scale is a power of two, halved for the doubled values; below 2^-126 it is subnormal."""
    exponent, numbers = _split(blocks, 1)
    return FP4_VALUES[_halves(numbers, 16)], np.ldexp(np.float32(1), exponent.astype(np.int32) - 128), None


def _nvfp4(blocks: Bytes) -> Parts:
    """Each 16 numbers have a scale in e4m3 without a sign, halved for the doubled values; 127 stands for 0."""
    exponents, numbers = _split(blocks, 4)
    exponent, mantissa = exponents >> 3 & 15, (exponents & 7).astype(np.float32)
    scale = np.where(exponent == 0, mantissa * 2.0**-9, np.ldexp(1 + mantissa / 8, exponent.astype(np.int32) - 7))
    scale = np.where((exponents == 0) | (exponents == 127), 0, scale / 2)
    return FP4_VALUES[_halves(numbers, 8)], scale.astype(np.float16), None


def _scales_and_minimums(field: Bytes) -> tuple[Bytes, Bytes]:
    """The eight scales and eight minimums of 6 bits in the 12 bytes of a super-block of Q4_K or Q5_K."""
    scale, minimum, both = field[:, :4], field[:, 4:8], field[:, 8:]
    return (
        np.concatenate([scale & 63, (both & 15) | (scale >> 2 & 48)], axis=1),
        np.concatenate([minimum & 63, (both >> 4) | (minimum >> 2 & 48)], axis=1),
    )


def _q4_k(blocks: Bytes) -> Parts:
    scale, minimum, field, numbers = _split(blocks, HALF, HALF, 12)
    scales, minimums = _scales_and_minimums(field)
    return _halves(numbers, 32), _wide(scale) * scales, -(_wide(minimum) * minimums)


def _q5_k(blocks: Bytes) -> Parts:
    scale, minimum, field, high, low = _split(blocks, HALF, HALF, 12, 32)
    scales, minimums = _scales_and_minimums(field)
    numbers = _halves(low, 32) | _fields(high, 32, tuple(range(8)), 1) << np.uint8(4)
    return numbers.astype(np.int8), _wide(scale) * scales, -(_wide(minimum) * minimums)


def _q6_k(blocks: Bytes) -> Parts:
    low, high, scales, scale = _split(blocks, 128, 64, 16)
    numbers = _halves(low, 64) | _fields(high, 32, (0, 2, 4, 6), 3) << np.uint8(4)
    return numbers.astype(np.int8) - np.int8(32), _wide(scale) * scales.view(np.int8), None


def _q2_k(blocks: Bytes) -> Parts:
    both, numbers, scale, minimum = _split(blocks, 16, 64, HALF)
    minimums = -(_wide(minimum) * (both >> 4))
    return _fields(numbers, 32, (0, 2, 4, 6), 3), _wide(scale) * (both & np.uint8(15)), minimums


def _q3_k(blocks: Bytes) -> Parts:
    """A number's third bit is stored inverted: without it the number is 4 less."""
    high, low, field, scale = _split(blocks, 32, 64, 12)
    lower, upper = _fields(field[:, :8], 8, (0, 4), 15), _fields(field[:, 8:], 4, (0, 2, 4, 6), 3)
    scales = (lower | upper << np.uint8(4)).astype(np.int8) - np.int8(32)
    third = _fields(high, 32, tuple(range(8)), 1) << np.uint8(2)
    numbers = _fields(low, 32, (0, 2, 4, 6), 3) | third  # 4 above its value
    return numbers + np.uint8(4), _wide(scale) * scales, None


def _iq4_xs(blocks: Bytes) -> Parts:
    scale, high, low, numbers = _split(blocks, HALF, 2, 4)
    upper = np.ascontiguousarray(high).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    lower = np.stack([low & 15, low >> 4], axis=-1).reshape(len(low), -1)
    scales = (lower | upper.astype(np.uint8) << np.uint8(4)).astype(np.int8) - np.int8(32)
    return IQ4_VALUES[_halves(numbers, 16)], _wide(scale) * scales, None


@dataclass(frozen=True)
class BlockType:
    """One type of blocks that can be carried."""

    encoding: Encoding
    unpack: Unpack

    def rows(self, data: Bytes, block_bytes: int) -> EncodedRows:
        """Rows (n, bytes) of a matrix as numbers, scales and minimums."""
        n = len(data)
        numbers, scales, minimums = self.unpack(data.reshape(-1, block_bytes))
        offsets = None if minimums is None else minimums.reshape(n, -1)
        return EncodedRows(numbers.reshape(n, -1), scales.reshape(n, -1), offsets)


# By the name of ggml's type. The others are read as the floats that they stand for.
BLOCK_TYPES: Mapping[str, BlockType] = {
    "Q4_0": BlockType(Encoding("int4", 32, "float16"), _q4_0),
    "Q4_1": BlockType(Encoding("int4", 32, "float16", "minimums"), _q4_1),
    "Q5_0": BlockType(Encoding("int8", 32, "float16"), _q5_0),
    "Q5_1": BlockType(Encoding("int8", 32, "float16", "minimums"), _q5_1),
    "Q8_0": BlockType(Encoding("int8", 32, "float16"), _q8_0),
    "Q2_K": BlockType(Encoding("int4", 16, "float32", "minimums"), _q2_k),
    "Q3_K": BlockType(Encoding("int4", 16, "float32"), _q3_k),
    "Q4_K": BlockType(Encoding("int4", 32, "float32", "minimums"), _q4_k),
    "Q5_K": BlockType(Encoding("int8", 32, "float32", "minimums"), _q5_k),
    "Q6_K": BlockType(Encoding("int8", 16, "float32"), _q6_k),
    "IQ4_NL": BlockType(Encoding("int8", 32, "float16"), _iq4_nl),
    "IQ4_XS": BlockType(Encoding("int8", 32, "float32"), _iq4_xs),
    "MXFP4": BlockType(Encoding("int8", 32, "float32"), _mxfp4),
    "NVFP4": BlockType(Encoding("int8", 16, "float16"), _nvfp4),
}
