"""`Format`: one way of storing the numbers of a matrix, from the weight file through ONNX to the panels for kernels.

To add a format, add a file beside this one that makes a `Format`, and a row of `FORMATS` in `table.py`. Every format
stores row by row, so that a tensor can be stored a few rows at a time.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Record, TensorSpec

Array = NDArray[np.generic]
Float32 = NDArray[np.float32]
SCALE_SUFFIX, ZERO_POINT_SUFFIX = "_scale", "_zero_point"
# Neighbours of a token that share a scale when they are rounded, if the weight has no groups: outliers of a few
# channels coarsen only these neighbours.
DYNAMIC_GROUP = 64


class Storage(Record, frozen=True):
    """How the numbers of one (N, K) matrix are stored: its format and that format's options."""

    dtype: str  # a row of `FORMATS`
    group_size: int | None = None  # neighbours in a row that share a scale, if the format has scales for groups
    zero_points: bool = False  # a group's zero need not be in the middle of its range
    dynamic: bool = False  # activations are rounded to int8 before they are multiplied; see `rounded_together`

    def rounded_together(self, k: int) -> int:
        """How many neighbours of a token's K numbers share a scale when they are rounded.

        A group of them or, if K is not a multiple of the group size, all of them.
        """
        group = self.group_size or DYNAMIC_GROUP
        return k if k % group else group


class ModelTensor(Record, frozen=True):
    """One tensor of the model: its name, its shape, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    stored: Storage


class Scales(Enum):
    """Which numbers share a scale."""

    NONE = "none"
    ROWS = "rows"  # one float32 scale for each output
    GROUPS = "groups"  # one float16 scale for each group of neighbours in a row


@dataclass(frozen=True)
class WideningInput:
    """One stored tensor as the input of a widening. Dtypes are names of ONNX data types."""

    suffix: str = ""  # added to the tensor's own name
    cast: str | None = None  # the dtype to which it is cast first
    number: str | None = None  # the dtype declared for its bytes, with the model's shape, if not the stored dtype


@dataclass(frozen=True)
class Widening:
    """How a graph turns stored tensors into the float32 weight: it casts some, then applies an ONNX operator to all."""

    inputs: tuple[WideningInput, ...]
    operator: str | None = None  # None if casting the only tensor is enough
    attributes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class MatrixLayout:
    """Shapes and dtypes of one packed matrix, its scales and zero points; see `runtime.artifact.layouts`."""

    name: str  # as in the manifest
    shape: tuple[int, ...]
    dtype: str
    scales: tuple[tuple[int, ...], str] | None = None
    zero_points: tuple[tuple[int, ...], str] | None = None


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
    store: Callable[[ModelTensor, Float32], dict[str, Array]]  # some rows to stored arrays by name
    load: Callable[[ModelTensor, Mapping[str, Array]], Float32]  # stored arrays to the exact values that graphs use
    widening: Callable[[ModelTensor], Widening | None]  # in ONNX; None if the graph reads the stored tensor directly
    packings: Mapping[LayoutKind, Packing]  # by the kinds of layout in which kernels read it
    scales: Scales = Scales.NONE
    words: bool = False  # when packed, eight 4-bit numbers share an int32
    multiplies_int8: bool = False  # kernels multiply it with rounded activations
    multiplies_float16: bool = False  # float16 holds every number exactly, apart from scales, as tensor cores need it
    multiple: int = 1  # K must be a multiple of this
    working_bytes: int = 0  # held per element while it is stored, besides the block and its float32 form
    kept_bytes: int = 0  # held per element after that, until the next block is stored

    @property
    def scaled(self) -> bool:
        """Whether the numbers have scales."""
        return self.scales is not Scales.NONE

    @property
    def grouped(self) -> bool:
        """Whether each scale belongs to a group of numbers in a row."""
        return self.scales is Scales.GROUPS
