"""The table of formats, and what their readers ask of it. A new format is a file in this folder and a row here."""

from collections.abc import Mapping

from export.checkpoints.encodings.encoding import EncodedRows
from export.weights.float8 import FLOAT8
from export.weights.format import Array, Float32, Format, LayoutKind, MatrixLayout, ModelTensor, Packing, Storage
from export.weights.int4 import INT4
from export.weights.int8 import INT8
from export.weights.plain import BFLOAT16, FLOAT16, FLOAT32
from runtime.artifact.layouts import PANEL, VECTOR, WORD
from runtime.artifact.manifest import DType, TensorSpec

FORMATS: Mapping[str, Format] = {
    "float32": FLOAT32,
    "float16": FLOAT16,
    "bfloat16": BFLOAT16,
    "int8": INT8,
    "int4": INT4,
    "float8": FLOAT8,
}
STORAGE_DTYPES: Mapping[str, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # by `backend.dtype`
EXPERTS = ".experts."  # occurs in the names of weights that stack one matrix for each expert


def format_of(stored: Storage) -> Format:
    """The format of a stored matrix."""
    return FORMATS[stored.dtype]


def specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    """The stored tensors of a tensor; first the one with the tensor's own name."""
    return format_of(tensor.stored).specs(tensor)


def store(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    """The stored arrays of a tensor, or of some of its rows, by stored name."""
    return format_of(tensor.stored).store(tensor, rows)


def carry(tensor: ModelTensor, rows: EncodedRows) -> dict[str, Array]:
    """The stored arrays of rows that keep a checkpoint's numbers, by stored name; its format must have scales."""
    write = format_of(tensor.stored).carry
    assert write is not None
    return write(tensor, rows)


def load(tensor: ModelTensor, stored: Mapping[str, Array]) -> Float32:
    """The float32 tensor that the graphs compute with."""
    return format_of(tensor.stored).load(tensor, stored)


def scaled_by_rows(stored: Storage) -> bool:
    """Whether each output has one scale, with which a kernel can multiply its sum."""
    return format_of(stored).scaled and not stored.grouped


def packing_of(stored: Storage, kind: LayoutKind) -> Packing:
    """How a stored matrix lies in an artifact with one kind of layout, which its format must support."""
    return format_of(stored).packings[kind]


def panel_layout(stored: Storage, n: int, k: int) -> MatrixLayout:
    """The layout of one (N, K) matrix for CPU kernels."""
    return packing_of(stored, "panels").layout(stored, n, k)


def vector_layout(stored: Storage, n: int, k: int) -> MatrixLayout:
    """The layout of one (N, K) matrix for GPU kernels."""
    return packing_of(stored, "vectors").layout(stored, n, k)


def vector_steps(stored: Storage) -> int:
    """Steps of K in the 16 bytes that a GPU thread loads at once."""
    numbers = vector_layout(stored, PANEL, VECTOR).shape[-1]
    return numbers * (WORD if format_of(stored).words else 1)
