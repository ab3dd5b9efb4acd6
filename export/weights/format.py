"""`Format`: one way of storing the numbers of a matrix, from the weight file through ONNX to the panels for kernels.

To add a format, add a file beside this one that makes a `Format`, and a row of `FORMATS` in `table.py`. Every format
stores row by row, so that a tensor can be stored a few rows at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from export.checkpoints.encodings.encoding import EncodedRows, Offsets, ScaleDType
from export.weights.widening import Widening
from runtime.artifact.manifest import Record, TensorSpec
from runtime.artifact.schemes import ROUNDING_LEVELS, Rounding

Array = NDArray[np.generic]
Float32 = NDArray[np.float32]
# What is added to the name of a matrix for its scales, the two kinds of offsets, and the order of its columns.
SCALE_SUFFIX, ZERO_POINT_SUFFIX, MINIMUM_SUFFIX, ORDER_SUFFIX = "_scale", "_zero_point", "_minimum", "_order"
# Neighbours of a token that share a scale when they are rounded, if the weight has no groups: outliers of a few
# channels coarsen only these neighbours.
DYNAMIC_GROUP = 64


class Storage(Record, frozen=True):
    """How the numbers of one (N, K) matrix are stored: its format and that format's options."""

    dtype: str  # a row of `FORMATS`
    group_size: int | None = None  # neighbours in a row that share a scale; None: all, if there are scales
    offsets: Offsets = "none"  # of groups: a group's zero need not be in the middle of its range
    rounding: Rounding = "none"  # of activations before they are multiplied; see `rounded_together`
    scales: ScaleDType = "float16"  # dtype of the groups' scales and minimums; a row's scale is float32
    reordered: bool = False  # columns lie in an order of their own, in which x is taken

    @property
    def rounds(self) -> bool:
        """Whether activations are rounded, so that products are of whole numbers."""
        return self.rounding != "none"

    @property
    def grouped(self) -> bool:
        """Whether each scale belongs to a group of numbers in a row."""
        return self.group_size is not None

    @property
    def zero_points(self) -> bool:
        """Whether a group has a whole number that stands for zero."""
        return self.offsets == "zero_points"

    @property
    def minimums(self) -> bool:
        """Whether a group has a float that is added to every scaled number."""
        return self.offsets == "minimums"

    def rounded_together(self, k: int) -> int:
        """How many neighbours of a token's K numbers share a scale when they are rounded.

        A group of them or, if K is not a multiple of the group size, all of them. A bfloat16 needs no scale.
        """
        if self.rounding not in ROUNDING_LEVELS:
            return 1
        group = self.group_size or DYNAMIC_GROUP
        return k if k % group else group


class ModelTensor(Record, frozen=True):
    """One tensor of the model: its name, its shape, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    stored: Storage
    carried: bool = False  # its numbers are those of the checkpoint, bit for bit


@dataclass(frozen=True)
class MatrixLayout:
    """Shapes and dtypes of one packed matrix and of what belongs to it; see `runtime.artifact.layouts`."""

    name: str  # as in the manifest
    shape: tuple[int, ...]
    dtype: str
    scales: tuple[tuple[int, ...], str] | None = None
    offsets: tuple[tuple[int, ...], str] | None = None  # zero points or minimums
    order: tuple[tuple[int, ...], str] | None = None  # of columns


LayoutKind = Literal["panels", "vectors"]  # the kind that a target's kernels read: `runtime.artifact.targets`


@dataclass(frozen=True)
class Packing:
    """How a format's matrices lie in an artifact with one kind of layout."""

    layout: Callable[[Storage, int, int], MatrixLayout]  # of an (N, K) matrix
    pack: Callable[[Storage, Array, int], Array]  # takes rows as stored, and the number of threads


@dataclass(frozen=True)
class Format:
    """One way of storing the numbers of a matrix, with everything that its readers must know."""

    specs: Callable[[ModelTensor], tuple[TensorSpec, ...]]  # stored tensors; first the one with the tensor's own name
    store: Callable[[ModelTensor, Float32], dict[str, Array]]  # some rows of floats to stored arrays by name
    load: Callable[[ModelTensor, Mapping[str, Array]], Float32]  # stored arrays to the exact values that graphs use
    widening: Callable[[ModelTensor], Widening | None]  # in ONNX; None if the graph reads the stored tensor directly
    packings: Mapping[LayoutKind, Packing]  # by the kinds of layout in which kernels read it
    # Some rows of a checkpoint to stored arrays by name, every number as it is; None if checkpoints hold plain numbers.
    carry: Callable[[ModelTensor, EncodedRows], dict[str, Array]] | None = None
    words: bool = False  # when packed, eight 4-bit numbers share an int32
    roundings: tuple[Rounding, ...] = ()  # of activations that kernels multiply its numbers with, besides none
    multiplies_float16: bool = False  # float16 holds every number exactly, apart from scales, as tensor cores need it
    multiple: int = 1  # K must be a multiple of this
    working_bytes: int = 0  # held per element while it is stored, besides the block and its float32 form
    kept_bytes: int = 0  # held per element after that, until the next block is stored

    @property
    def scaled(self) -> bool:
        """Whether the numbers have scales."""
        return self.carry is not None
