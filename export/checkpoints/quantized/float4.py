"""Reads floats of 4 bits (e2m1) as compressed-tensors stores them: NVFP4 in groups of 16, and MXFP4 in groups of 32.

weight_packed        uint8 (N, K / 2), the first number of a byte in its lower half
weight_scale         (N, groups)  NVFP4: e4m3; MXFP4: uint8, the exponent of a power of two plus 127
weight_global_scale  float32 (1,)  NVFP4: what scales are divided by

A weight is number * scale: `decompress` in compressed_tensors/compressors/nvfp4 and mxfp4. Numbers are doubled here,
which makes them whole, and scales halved, which is exact.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.checkpoints.encodings.encoding import EncodedRows, Encoding, check_finite
from export.checkpoints.quantized.matrix import Float32, Found, QuantizedMatrix, floats_of
from export.checkpoints.quantized.module import Module, modules, unpacked
from export.checkpoints.source import TensorSource

PACKED, SCALE, GLOBAL_SCALE = "weight_packed", "weight_scale", "weight_global_scale"
DOUBLED = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.int8)  # e2m1, by its bits
NVFP4_GROUP, MXFP4_GROUP = 16, 32
NOT_A_NUMBER = 255  # of an exponent
EXPONENT_OF_HALF = 128  # a stored exponent of 128 is 2, half of which is 1


@dataclass(frozen=True)
class Float4Matrix:
    """A matrix of 4-bit floats, to be carried as int8."""

    module: Module
    columns: int
    group: int

    @property
    def encoding(self) -> Encoding:
        """Groups of 16 or 32."""
        return Encoding("int8", self.group, "float32")

    def read(self, rows: slice) -> EncodedRows:
        """Some rows; raises `UserError` for a scale that is NaN or infinite."""
        numbers: NDArray[np.int8] = DOUBLED[unpacked(self.module.read(PACKED, rows), 4, self.columns)]
        found = EncodedRows(numbers, self._scales(rows))
        check_finite(found, self.module.of(SCALE), rows.start or 0)
        return found

    def _scales(self, rows: slice) -> Float32:
        stored = self.module.read(SCALE, rows)
        if self.group == MXFP4_GROUP:
            powers = np.ldexp(np.float32(1), stored.astype(np.int32) - EXPONENT_OF_HALF).astype(np.float32)
            powers[stored == NOT_A_NUMBER] = np.nan
            return powers
        with np.errstate(divide="ignore", invalid="ignore"):  # reported by `check_finite`
            return np.asarray(stored.astype(np.float32) / self.module.read(GLOBAL_SCALE) / 2, np.float32)


def read_float4(source: TensorSource, where: str) -> Found:
    """The matrices that a source stores as floats of 4 bits; raises `UserError` for what does not fit together."""
    found = [m for m in modules(source, where, PACKED) if source.tensors[m.of(PACKED)].dtype == "uint8"]
    return Found({module.matrix: _matrix(module) for module in found})


def _matrix(module: Module) -> QuantizedMatrix:
    n, width = module.need(PACKED, ("uint8",))
    k = width * 2
    scaled = module.has(GLOBAL_SCALE)
    group, dtype = (NVFP4_GROUP, "float8_e4m3fn") if scaled else (MXFP4_GROUP, "uint8")
    module.check(SCALE, (dtype,), (n, module.check_groups(k, group)), f"groups of {group}")
    if scaled:
        module.check(GLOBAL_SCALE, ("float32",), (1,), "the whole matrix")
    matrix = Float4Matrix(module, k, group)
    stored = module.present(PACKED, SCALE, GLOBAL_SCALE)
    name = "NVFP4" if scaled else "MXFP4"
    return QuantizedMatrix((n, k), name, f"in groups of {group}", stored, floats_of(matrix), matrix)
