"""Reads AWQ in the layout `gemm`: numbers of 4 bits, packed along the rows of a matrix, as AutoAWQ writes them.

qweight  int32 (K, N / 8)  the numbers of 8 rows in a word, in the order of `ROW_OF_NIBBLE`
qzeros   int32 (groups, N / 8)  zero points, in the same order
scales   (groups, N)

A weight is scale * (number - zero point): `dequantize_gemm` in awq/utils/packing_utils.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.checkpoints.json_files import convert
from export.checkpoints.quantized.affine import ZeroPoints, affine_matrix
from export.checkpoints.quantized.matrix import Found, QuantizedMatrix
from export.checkpoints.quantized.module import FLOATS, WORDS, Module, modules, unpacked
from export.checkpoints.source import Array, TensorSource
from runtime.errors import UserError

BITS, PER_WORD = 4, 8
ROW_OF_NIBBLE = (0, 2, 4, 6, 1, 3, 5, 7)  # the lowest nibble of a word first
NIBBLE_OF_ROW = np.argsort(ROW_OF_NIBBLE)
VERSION = "gemm"
TENSORS = ("qweight", "qzeros", "scales")


class _Settings(msgspec.Struct, frozen=True):
    bits: int
    group_size: Annotated[int, msgspec.Meta(ge=-1)]
    version: str | None = None
    format: str | None = None  # what transformers and GPTQModel call it
    checkpoint_format: str | None = None
    backend: str | None = None


def read_awq(source: TensorSource, settings: Mapping[str, object], where: str) -> Found:
    """The matrices that a source stores as AutoAWQ does; raises `UserError` for what does not fit together."""
    found = list(modules(source, where, "qweight"))
    if not found:
        return Found()
    said = convert(settings, _Settings, f"{where}, quantization of awq")
    version = (said.version or said.format or said.checkpoint_format or VERSION).lower()
    version = "llm-awq" if said.backend == "llm-awq" else version
    if version != VERSION:
        raise UserError(
            f"{where} has an AWQ checkpoint of the version {version!r}, expected {VERSION!r}; "
            "set frontend.checkpoint to a checkpoint in that layout"
        )
    if said.bits != BITS:
        raise UserError(f"{where} has an AWQ checkpoint of {said.bits} bits, expected {BITS}")
    return Found({m.matrix: _matrix(AwqStorage(m), said.group_size) for m in found})


@dataclass(frozen=True)
class AwqStorage:
    """Reads the tensors of one matrix."""

    module: Module

    @property
    def shape(self) -> tuple[int, int]:
        """The matrix's (N, K)."""
        k, words = self.module.source.tensors[self.module.of("qweight")].shape
        return words * PER_WORD, k

    def numbers(self, rows: slice) -> NDArray[np.uint8]:
        """As `AffineStorage` says."""
        return self._rows("qweight", rows)

    def scales(self, rows: slice) -> Array:
        """As `AffineStorage` says."""
        start, stop, _ = rows.indices(self.shape[0])
        return self.module.columns("scales", start, stop).T

    def zero_points(self, rows: slice) -> ZeroPoints:
        """As `AffineStorage` says."""
        return self._rows("qzeros", rows).astype(np.int16)

    def _rows(self, ending: str, rows: slice) -> NDArray[np.uint8]:
        start, stop, _ = rows.indices(self.shape[0])
        first, last = start // PER_WORD, -(-stop // PER_WORD)
        words = self.module.columns(ending, first, last)
        nibbles = unpacked(words, BITS, (last - first) * PER_WORD).reshape(len(words), -1, PER_WORD)
        ordered = nibbles[:, :, NIBBLE_OF_ROW].reshape(len(words), -1)
        return np.ascontiguousarray(ordered[:, start - first * PER_WORD : stop - first * PER_WORD].T)


def _matrix(storage: AwqStorage, group_size: int) -> QuantizedMatrix:
    module = storage.module
    module.need("qweight", WORDS)
    n, k = storage.shape
    size = k if group_size == -1 else group_size
    groups = module.check_groups(k, size)
    module.check("scales", FLOATS, (groups, n), f"{groups} groups of {n} rows")
    module.check("qzeros", WORDS, (groups, n // PER_WORD), f"zero points of {BITS} bits for {groups} groups")
    return affine_matrix(
        module,
        f"AWQ {BITS}-bit",
        (n, k),
        storage,
        bits=BITS,
        group_size=size,
        scale="scales",
        stored=module.present(*TENSORS),
    )
