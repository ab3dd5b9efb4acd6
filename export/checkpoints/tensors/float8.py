"""Matrices published as 8-bit floats (e4m3) with scales, read as float32: each number times its scale.

A scale belongs to the whole matrix, to each row, or to blocks. It is multiplied with, whatever "inv" in its name
suggests. Scales of activations and of caches are left out: both stay as they are, which is the more exact of the two.
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
OTHER_SCALES = (  # of activations and of the cache
    ".activation_scale", ".input_scale", ".output_scale", ".qscale_act", ".k_scale", ".v_scale", ".kv_scale",
)  # fmt: skip
Block = tuple[int, int]  # rows and columns that have a scale in common


@dataclass(frozen=True)
class Float8Tensors:
    """The tensors of a source with its 8-bit floats widened; `scales` maps such a matrix to its scale."""

    source: TensorSource
    scales: Mapping[str, str]
    block: Block | None = None  # as the configuration gives it

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name, without scales."""
        used = set(self.scales.values())
        return {
            name: SourceTensor(tensor.shape, "float32", tensor.nbytes) if name in self.scales else tensor
            for name, tensor in self.source.tensors.items()
            if name not in used and not name.endswith(OTHER_SCALES)
        }

    def read(self, name: str, rows: slice) -> Array:
        """Rows (n, columns) of one tensor."""
        numbers = self.source.read(name, rows)
        if name not in self.scales:
            return numbers
        shape = matrix_shape(self.source.tensors[name].shape)
        start, stop, _ = rows.indices(shape[0])
        grid = self._grid(self.scales[name])
        height, width = _block_of(grid.shape, shape, self.block) or shape
        of_rows, of_columns = np.arange(start, stop) // height, np.arange(shape[1]) // width
        return np.asarray(numbers.astype(np.float32) * grid[of_rows][:, of_columns])

    def _grid(self, name: str) -> Array:
        """A scale as a matrix, each of whose numbers is for one block."""
        values = self.source.read(name, slice(None)).astype(np.float32)
        return values.reshape(_grid_shape(self.source.tensors[name].shape))


def widened(source: TensorSource, where: str, block: Block | None = None) -> tuple[TensorSource, tuple[str, ...]]:
    """The source with its 8-bit floats as float32, and a note if it has any.

    `block` is the size of a block, if the configuration gives one; else a grid of scales divides a matrix into equal
    ones. Raises `UserError` for a matrix without a scale, and for a scale whose grid fits neither.
    """
    stored = source.tensors
    matrices = [name for name, tensor in stored.items() if tensor.dtype == FLOAT8]
    scales = {name: _scale_of(name, stored, where, block) for name in matrices}
    if not matrices:
        return source, ()
    nbytes = sum(stored[name].nbytes for name in matrices)
    return Float8Tensors(source, scales, block), (
        f"8-bit floats are read as their exact values (matrices: {len(matrices)}, {nbytes / 1e9:.2f} GB)",
    )


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
