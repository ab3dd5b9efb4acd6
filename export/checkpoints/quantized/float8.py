"""Reads matrices published as 8-bit floats (e4m3) with scales: each number times its scale.

A scale belongs to the whole matrix, to each row, or to blocks. It is multiplied with, whatever "inv" in its name
suggests. Hugging Face (`fp8`, `fbgemm_fp8`, compressed-tensors) and Mistral publish such matrices, under several names.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from export.checkpoints.encodings.encoding import EncodedRows, Encoding, check_finite
from export.checkpoints.quantized.matrix import Found, QuantizedMatrix, floats_of
from export.checkpoints.quantized.module import FLOATS
from export.checkpoints.source import SourceTensor, TensorSource, matrix_shape
from runtime.errors import UserError

FLOAT8 = "float8_e4m3fn"
WEIGHT = ".weight"
# What follows a matrix's name: the scale of its numbers, in Hugging Face folders and in Mistral's own format.
SCALES = (".weight_scale_inv", ".weight_scale", ".qscale_weight")
NOT_A_NUMBER = 0x7F  # the bits of NaN, without the sign; e4m3 has no infinity
Block = tuple[int, int]  # rows and columns that have a scale in common


@dataclass(frozen=True)
class Float8Matrix:
    """A matrix of 8-bit floats, to be carried as it is."""

    source: TensorSource
    name: str
    scale: str
    shape: tuple[int, ...]  # (N, K)
    block: tuple[int, ...]  # rows and columns that have a scale in common

    @property
    def encoding(self) -> Encoding:
        """Groups are as wide as blocks."""
        width = self.block[1]
        return Encoding("float8", None if width >= self.shape[1] else width, "float32")

    def read(self, rows: slice) -> EncodedRows:
        """Some rows, each with its own scales; raises `UserError` for a number or a scale that is no finite number."""
        start, stop, _ = rows.indices(self.shape[0])
        bits = self.source.read(self.name, slice(start, stop)).view(np.uint8)
        bad = ((bits & np.uint8(NOT_A_NUMBER)) == NOT_A_NUMBER).any(axis=1)
        if bad.any():
            raise UserError(
                f"the tensor {self.name} holds a NaN or an infinite number in row {start + int(bad.argmax())}, "
                "expected finite numbers; fetch the checkpoint again"
            )
        grid = self.source.read(self.scale, slice(None)).astype(np.float32)
        grid = grid.reshape(_grid_shape(self.source.tensors[self.scale].shape))
        found = EncodedRows(bits, grid[np.arange(start, stop) // self.block[0]])
        check_finite(found, self.scale, start)
        return found


def read_float8(source: TensorSource, where: str, block: Block | None = None) -> Found:
    """The matrices that a source stores as 8-bit floats.

    `block` is the size of a block, if the configuration gives one; else a grid of scales divides a matrix into equal
    ones. Raises `UserError` for a matrix without a scale, and for a scale whose grid fits neither.
    """
    stored = source.tensors
    return Found(
        {name: _matrix(source, name, where, block) for name, tensor in stored.items() if tensor.dtype == FLOAT8}
    )


def _matrix(source: TensorSource, name: str, where: str, block: Block | None) -> QuantizedMatrix:
    scale = _scale_of(name, source.tensors, where, block)
    whole = source.tensors[name].shape
    shape = matrix_shape(whole)
    size = _block_of(_grid_shape(source.tensors[scale].shape), shape, block)
    assert size is not None
    matrix = Float8Matrix(source, name, scale, shape, size)
    return QuantizedMatrix(whole, "FP8", _details(shape, size), (name, scale), floats_of(matrix), matrix)


def _details(shape: tuple[int, ...], block: tuple[int, ...]) -> str:
    if block[1] < shape[1]:
        return f"in blocks of {block[0]} x {block[1]}"
    return "with a scale for each row" if block[0] == 1 else "with a scale for each matrix"


def _scale_of(name: str, stored: Mapping[str, SourceTensor], where: str, block: Block | None) -> str:
    """The name of a matrix's scale, whose shape has been checked."""
    candidates = [name.removesuffix(WEIGHT) + suffix for suffix in SCALES]
    found = [candidate for candidate in candidates if candidate in stored]
    if len(found) != 1:
        raise UserError(
            f"{where}: {name} holds 8-bit floats and has {len(found)} scales, expected one named "
            f"{' or '.join(candidates)}; fetch the checkpoint again"
        )
    shape, matrix = stored[found[0]].shape, matrix_shape(stored[name].shape)
    fits = len(shape) <= 2 and len(matrix) == 2 and _block_of(_grid_shape(shape), matrix, block) is not None
    if not fits or stored[found[0]].dtype not in FLOATS:
        raise UserError(
            f"{where}: {found[0]} has the shape {shape} and dtype {stored[found[0]].dtype}, expected floats in a grid "
            f"that divides {name} {matrix} into {'equal blocks' if block is None else f'blocks of {block}'}; "
            "fetch the checkpoint again"
        )
    return found[0]


def _grid_shape(scale: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a scale as a grid of blocks: a number is for a whole matrix, a vector has one for each row."""
    return (*scale, 1, 1)[:2]


def _block_of(grid: tuple[int, ...], matrix: tuple[int, ...], block: Block | None) -> tuple[int, ...] | None:
    """The size of the blocks that have a number each in a grid: `block`, of which the last may be cut short, or equal.

    None if the grid is neither's.
    """
    if block is not None and all(-(-size // of) == n for n, size, of in zip(grid, matrix, block, strict=True)):
        return block
    if all(n > 0 and size % n == 0 for n, size in zip(grid, matrix, strict=True)):
        return tuple(size // n for n, size in zip(grid, matrix, strict=True))
    return None
