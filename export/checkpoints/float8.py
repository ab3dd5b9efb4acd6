"""Matrices published as 8-bit floats (e4m3) with scales, read as float32: each number times its scale.

A scale belongs to the whole matrix, to each row, or to blocks. It is multiplied with, whatever "inv" in its name
suggests. Scales of activations are left out: activations stay as they are, which is the more exact of the two.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from export.checkpoints.source import Array, SourceTensor, TensorSource, matrix_shape
from runtime.errors import UserError

FLOAT8 = "float8_e4m3fn"
WEIGHT = ".weight"
# What follows a matrix's name: the scale of its numbers, in Hugging Face folders and in Mistral's own format.
SCALES = (".weight_scale_inv", ".weight_scale", ".qscale_weight")
FLOATS = ("float32", "float16", "bfloat16")  # of scales
ACTIVATION_SCALES = (".activation_scale", ".input_scale", ".qscale_act")


@dataclass(frozen=True)
class Float8Tensors:
    """The tensors of a source with its 8-bit floats widened; `scales` maps such a matrix to its scale."""

    source: TensorSource
    scales: Mapping[str, str]

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name, without scales."""
        used = set(self.scales.values())
        return {
            name: SourceTensor(tensor.shape, "float32", tensor.nbytes) if name in self.scales else tensor
            for name, tensor in self.source.tensors.items()
            if name not in used and not name.endswith(ACTIVATION_SCALES)
        }

    def read(self, name: str, rows: slice) -> Array:
        """Rows (n, columns) of one tensor."""
        numbers = self.source.read(name, rows)
        if name not in self.scales:
            return numbers
        n_rows, n_columns = matrix_shape(self.source.tensors[name].shape)
        start, stop, _ = rows.indices(n_rows)
        grid = self._grid(self.scales[name])
        height, width = n_rows // grid.shape[0], n_columns // grid.shape[1]
        scale = grid[np.arange(start, stop) // height].repeat(width, axis=1)  # (n, columns)
        return np.asarray(numbers.astype(np.float32) * scale)

    def _grid(self, name: str) -> Array:
        """A scale as a matrix, each of whose numbers is for one block."""
        shape = self.source.tensors[name].shape
        values = self.source.read(name, slice(None)).astype(np.float32)
        return values.reshape(shape if len(shape) == 2 else (-1, 1))


def widened(source: TensorSource, where: str) -> tuple[TensorSource, tuple[str, ...]]:
    """The source with its 8-bit floats as float32, and a note if it has any.

    Raises `UserError` for a matrix without a scale, and for a scale that does not divide it into equal blocks.
    """
    stored = source.tensors
    matrices = [name for name, tensor in stored.items() if tensor.dtype == FLOAT8]
    scales = {name: _scale_of(name, stored, where) for name in matrices}
    if not matrices:
        return source, ()
    nbytes = sum(stored[name].nbytes for name in matrices)
    return Float8Tensors(source, scales), (
        f"8-bit floats are read as their exact values (matrices: {len(matrices)}, {nbytes / 1e9:.2f} GB)",
    )


def _scale_of(name: str, stored: Mapping[str, SourceTensor], where: str) -> str:
    """The name of a matrix's scale, whose shape has been checked."""
    candidates = [name.removesuffix(WEIGHT) + suffix for suffix in SCALES]
    found = [candidate for candidate in candidates if candidate in stored]
    if len(found) != 1:
        raise UserError(
            f"{where}: {name} holds 8-bit floats and has {len(found)} scales, expected one named "
            f"{' or '.join(candidates)}; fetch the checkpoint again"
        )
    shape, matrix = stored[found[0]].shape, matrix_shape(stored[name].shape)
    if not _divides(shape, matrix) or stored[found[0]].dtype not in FLOATS:
        raise UserError(
            f"{where}: {found[0]} has the shape {shape} and dtype {stored[found[0]].dtype}, expected floats in a grid "
            f"that divides {name} {matrix} into equal blocks"
        )
    return found[0]


def _divides(scale: tuple[int, ...], matrix: tuple[int, ...]) -> bool:
    """Whether a scale of this shape gives equal blocks of a matrix a number each."""
    if len(scale) > 2 or len(matrix) != 2:
        return False
    return all(n > 0 and size % n == 0 for n, size in zip(scale, matrix, strict=False))
