"""Reads MLX: whole numbers of 2 to 8 bits in 32-bit words, with a scale and a bias for each group.

weight  uint32 (N, K * bits / 32), the first numbers in the lowest bits
scales  (N, groups)
biases  (N, groups)

A weight is scale * number + bias: `dequantize` of mlx.core.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.checkpoints.encodings.encoding import EncodedRows, Encoding, check_finite, spread
from export.checkpoints.json_files import convert
from export.checkpoints.quantized.matrix import Float32, Found, QuantizedMatrix
from export.checkpoints.quantized.module import FLOATS, WORDS, Module, modules, unpacked
from export.checkpoints.source import TensorSource
from runtime.errors import UserError

BITS = (2, 3, 4, 5, 6, 8)
CARRIED_BITS = 7  # at most: 8 bits would need a sum of scale and bias, which may be rounded
WORD = 32  # bits
AFFINE = "affine"
TENSORS = ("weight", "scales", "biases")


class _Settings(msgspec.Struct, frozen=True):
    bits: int
    group_size: int
    mode: str = AFFINE


@dataclass(frozen=True)
class MlxMatrix:
    """A matrix in groups with biases."""

    module: Module
    shape: tuple[int, int]
    bits: int
    group_size: int

    @property
    def encoding(self) -> Encoding:
        """Biases are minimums."""
        dtypes = {self.module.source.tensors[self.module.of(ending)].dtype for ending in ("scales", "biases")}
        scales = "float16" if dtypes == {"float16"} else "float32"
        return Encoding("int4" if self.bits <= 4 else "int8", self.group_size, scales, "minimums")  # type: ignore[arg-type]

    def read(self, rows: slice) -> EncodedRows:
        """Some rows; raises `UserError` for a scale or bias that is NaN or infinite."""
        numbers = self._numbers(rows)
        dtype = self.encoding.scales
        scales, biases = (self.module.read(ending, rows).astype(dtype) for ending in ("scales", "biases"))
        found = EncodedRows(numbers if self.bits <= 4 else numbers.view(np.int8), scales, biases)
        check_finite(found, self.module.of("scales"), rows.start or 0)
        return found

    def floats(self, rows: slice) -> Float32:
        """Some rows as float32."""
        k = self.shape[1]
        scales, biases = (spread(self.module.read(e, rows), self.encoding, k) for e in ("scales", "biases"))
        return scales * self._numbers(rows) + biases

    def _numbers(self, rows: slice) -> NDArray[np.uint8]:
        return unpacked(self.module.read("weight", rows), self.bits, self.shape[1])


def read_mlx(source: TensorSource, settings: Mapping[str, object], where: str) -> Found:
    """The matrices that a source stores as MLX does; settings may name modules with settings of their own.

    Raises `UserError` for what does not fit together.
    """
    matrices = {}
    for module in modules(source, where, "biases"):
        own = settings.get(module.name)
        said = convert({**settings, **own} if isinstance(own, dict) else settings, _Settings, f"{where}, quantization")
        matrices[module.matrix] = _matrix(module, said)
    return Found(matrices)


def _matrix(module: Module, said: _Settings) -> QuantizedMatrix:
    if said.mode != AFFINE or said.bits not in BITS:
        raise UserError(
            f"{module.where} has an MLX checkpoint in the mode {said.mode!r} with {said.bits} bits, expected the mode "
            f"{AFFINE!r} with one of {BITS}; set frontend.checkpoint to another checkpoint of the model"
        )
    n, words = module.need("weight", WORDS)
    if words * WORD % said.bits:
        module.refuse("weight", module.source.tensors[module.matrix], f"whole words of {said.bits}-bit numbers")
    k = words * WORD // said.bits
    groups = module.check_groups(k, said.group_size)
    for ending in ("scales", "biases"):
        module.check(ending, FLOATS, (n, groups), f"{n} rows of {groups} groups")
    matrix = MlxMatrix(module, (n, k), said.bits, said.group_size)
    return QuantizedMatrix(
        (n, k),
        f"MLX {said.bits}-bit",
        f"in groups of {said.group_size}",
        module.present(*TENSORS),
        matrix.floats,
        matrix if said.bits <= CARRIED_BITS else None,
    )
