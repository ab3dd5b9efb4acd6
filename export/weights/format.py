"""What a format is: one way of storing the numbers of a matrix, from the weight file through ONNX to the panels that kernels read.

A new format is a file beside this one, which makes a `Format`, and a row of `FORMATS` in `table.py`. Every format stores row by row, so that a
tensor can be stored a few rows at a time.
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
DYNAMIC_GROUP = 64  # neighbours of a token that share a scale when they are rounded, where the weight has no groups


class Storage(Record, frozen=True):
    """How the numbers of one (N, K) matrix are stored: its format, and what that leaves open."""

    dtype: str  # a row of `FORMATS`
    group_size: int | None = None  # neighbours in a row that share a scale, of a format with scales of groups
    zero_points: bool = False  # a group's zero need not be in the middle of its range
    dynamic: bool = False  # what it is multiplied with is rounded to int8 first; see `rounded_together`

    def rounded_together(self, k: int) -> int:
        """How many neighbours of a token's K numbers share a scale when they are rounded: a group, or all where K is no multiple of one."""
        group = self.group_size or DYNAMIC_GROUP
        return k if k % group else group


class ModelTensor(Record, frozen=True):
    """One tensor of the model: its name and shape there, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    stored: Storage


class Scales(Enum):
    """What shares a scale."""

    NONE = "none"
    ROWS = "rows"  # float32, one for each output
    GROUPS = "groups"  # float16, one for each group of neighbours in a row


@dataclass(frozen=True)
class WideningInput:
    """One stored tensor in a graph. Dtypes are names of ONNX's data types."""

    suffix: str = ""  # behind the tensor's own name
    cast: str | None = None  # to what it is cast first
    number: str | None = (
        None  # as what its bytes are declared, with the model's shape, where that is not the stored dtype
    )


@dataclass(frozen=True)
class Widening:
    """How a graph turns stored tensors into the float32 weight: a cast of some of them and then, over all, an operator of ONNX."""

    inputs: tuple[WideningInput, ...]
    operator: str | None = None  # None where the cast of the one tensor is all
    attributes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class MatrixLayout:
    """Shapes and dtypes of one packed matrix and of what goes with it; see `runtime.artifact.layouts`."""

    name: str  # as the manifest has it
    shape: tuple[int, ...]
    dtype: str
    scales: tuple[tuple[int, ...], str] | None = None
    zero_points: tuple[tuple[int, ...], str] | None = None


LayoutKind = Literal["panels", "vectors"]  # what a target's kernels read: `runtime.artifact.targets`


@dataclass(frozen=True)
class Packing:
    """How a format's matrices lie in an artifact of one kind of layout."""

    layout: Callable[[Storage, int, int], MatrixLayout]  # of an (N, K) matrix
    pack: Callable[[Storage, Array, int], Array]  # rows as stored, and the number of threads


@dataclass(frozen=True)
class Format:
    """One way of storing the numbers of a matrix, and what everything that reads it must know."""

    specs: Callable[[ModelTensor], tuple[TensorSpec, ...]]  # the stored tensors, the one of the tensor's own name first
    store: Callable[[ModelTensor, Float32], dict[str, Array]]  # of some rows, to stored arrays by name
    load: Callable[[ModelTensor, Mapping[str, Array]], Float32]  # the exact inverse, as every graph computes with it
    widening: Callable[[ModelTensor], Widening | None]  # in ONNX; None: the graph reads the stored tensor as it is
    packings: Mapping[LayoutKind, Packing]  # kinds of layout in which kernels read it
    scales: Scales = Scales.NONE
    words: bool = False  # packed, eight 4-bit numbers share an int32
    multiplies_int8: bool = False  # kernels multiply it with rounded activations
    multiplies_float16: bool = False  # every number, its scale aside, is one of float16, as tensor cores take it
    multiple: int = 1  # of K
    working_bytes: int = 0  # held for an element while it is stored, beside the block and its float32 form
    kept_bytes: int = 0  # and after that, until the next block is stored

    @property
    def scaled(self) -> bool:
        """Whether scales go with the numbers."""
        return self.scales is not Scales.NONE

    @property
    def grouped(self) -> bool:
        """Whether a scale belongs to a group of a row's numbers."""
        return self.scales is Scales.GROUPS
