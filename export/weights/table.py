"""The table of formats, and the choice of one for each tensor of a model.

A new format is a file in this folder and a row of `FORMATS`; a new `quantize.scheme` is a row of
`runtime.artifact.schemes.SCHEMES`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from export.weights.format import Array, Float32, Format, LayoutKind, MatrixLayout, ModelTensor, Packing, Storage
from export.weights.int4 import INT4
from export.weights.int8 import INT8
from export.weights.plain import BFLOAT16, FLOAT16, FLOAT32
from runtime.artifact.layouts import PANEL, VECTOR, WORD
from runtime.artifact.manifest import DType, Quantization, TensorSpec
from runtime.artifact.schemes import SCHEMES, Scheme

FORMATS: Mapping[str, Format] = {
    "float32": FLOAT32,
    "float16": FLOAT16,
    "bfloat16": BFLOAT16,
    "int8": INT8,
    "int4": INT4,
}
PRECISE = Storage(dtype="float32")
STORAGE_DTYPES: Mapping[str, DType] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}  # by `backend.dtype`
CACHE_DTYPES: Mapping[str, DType] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}  # by `quantize.cache`
ROUTER = ".feed_forward.gate.weight"
EXPERTS = ".experts."  # occurs in the names of weights that stack one matrix for each expert
HEAD_WEIGHTS = ("output.weight", "tok_embeddings.weight")  # the second if embeddings are tied


def format_of(stored: Storage) -> Format:
    """The format of a stored matrix."""
    return FORMATS[stored.dtype]


def specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    """The stored tensors of a tensor; first the one with the tensor's own name."""
    return format_of(tensor.stored).specs(tensor)


def store(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    """The stored arrays of a tensor, or of some of its rows, by stored name."""
    return format_of(tensor.stored).store(tensor, rows)


def load(tensor: ModelTensor, stored: Mapping[str, Array]) -> Float32:
    """The float32 tensor that the graphs compute with."""
    return format_of(tensor.stored).load(tensor, stored)


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


def storage_of(scheme: Scheme, quantization: Quantization, dtype: DType) -> Storage:
    """How a scheme stores a matrix; `dtype` is the one to store if the scheme leaves it to `backend.dtype`."""
    name = scheme.format or dtype
    if not FORMATS[name].grouped:
        return Storage(dtype=name, dynamic=scheme.dynamic)
    return Storage(
        dtype=name,
        group_size=quantization.group_size,
        zero_points=not quantization.symmetric,
        dynamic=scheme.dynamic,
    )


@dataclass(frozen=True)
class StorageRules:
    """How each tensor of one model is stored."""

    quantization: Quantization
    dtype: DType  # of matrices to which no scheme applies
    tied_embeddings: bool
    n_layers: int

    def tensor(self, name: str, shape: tuple[int, ...]) -> ModelTensor:
        """A tensor with its storage."""
        return ModelTensor(name=name, shape=shape, stored=self._storage(name, shape))

    def _storage(self, name: str, shape: tuple[int, ...]) -> Storage:
        if len(shape) == 1 or name.endswith(ROUTER):
            return PRECISE  # a few kilobytes, and their precision affects every layer
        if name == "tok_embeddings.weight" and not self.tied_embeddings:
            return Storage(dtype=self.dtype)  # one row is read per token: narrower storage would save only disk space
        scheme = self.quantization.keep_scheme if self._is_kept(name) else self.quantization.scheme
        chosen = storage_of(SCHEMES[scheme], self.quantization, self.dtype)
        if EXPERTS in name or shape[1] % format_of(chosen).multiple:
            return ROUNDED if format_of(chosen).scaled else chosen  # the kernels for experts support no other format
        if name in HEAD_WEIGHTS and not format_of(chosen).grouped:
            return without_rounding(chosen)  # a language model's head gets one token per call and is memory-bound
        return chosen

    def _is_kept(self, name: str) -> bool:
        places = {
            "head": name in HEAD_WEIGHTS,
            "first": name.startswith("layers.0."),
            "last": name.startswith(f"layers.{self.n_layers - 1}."),
        }
        return any(places[place] for place in self.quantization.keep)


ROUNDED = Storage(dtype="int8")  # used where a narrower format does not fit


def without_rounding(stored: Storage) -> Storage:
    """The same storage, but multiplied with unrounded activations."""
    return Storage(dtype=stored.dtype, group_size=stored.group_size, zero_points=stored.zero_points)
