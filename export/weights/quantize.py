"""How each tensor of a model is stored, and the exact inverse. The same numbers go into ONNX and into the artifact.

Every format stores row by row, so that a tensor can be stored a few rows at a time. A new scheme is a row in `SCHEMES`; a new way of storing
numbers is a row in `CODECS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from export.static_model.constants import DYNAMIC_GROUP
from runtime.artifact.manifest import DType, Quantization, Record, TensorSpec

Array = NDArray[np.generic]
Float32 = NDArray[np.float32]
SCALE_SUFFIX, ZERO_POINT_SUFFIX = "_scale", "_zero_point"
ROUTER = ".feed_forward.gate.weight"
EXPERTS = ".experts."  # in the names of weights that stack one matrix for each expert
INT8_MAX = 127  # symmetric: -128 is left unused, so that negation is exact
INT4_ZERO = 8  # symmetric int4 goes from -8 to 7; a 4-bit number without sign is 8 more
INT4_MAX = 15
INT4_SEARCH = 2**18  # numbers whose scales are searched for together
INT4_MULTIPLE = 8  # of K: eight 4-bit numbers are packed together
HEAD = ("output.weight", "tok_embeddings.weight")  # the second where embeddings are tied
STORAGE: dict[str, DType] = {
    "fp32": "float32",
    "fp16": "float16",
    "bf16": "bfloat16",
}  # backend.dtype to that of matrices
CACHE_STORAGE: dict[str, DType] = {"fp32": "float32", "fp16": "float16", "int8": "int8"}


class MatrixFormat(Record, frozen=True):
    """How the numbers of a (N, K) matrix are stored, and what they are multiplied with."""

    dtype: str  # of each number: "float32", "float16", "bfloat16", "int8" or "int4"
    group_size: int | None = None  # neighbours in a row that share a scale; None: the whole row, where there are scales
    zero_points: bool = False  # a group's zero need not be in the middle of its range
    dynamic: bool = False  # what it is multiplied with is rounded to int8 first; see `rounded_together`

    @property
    def scaled(self) -> bool:
        """Whether scales go with the numbers."""
        return self.dtype in ("int8", "int4")

    def rounded_together(self, k: int) -> int:
        """How many neighbours of a token's K numbers share a scale when they are rounded: a group, or all where K is not a multiple of one."""
        group = self.group_size or DYNAMIC_GROUP
        return k if k % group else group


class ModelTensor(Record, frozen=True):
    """One tensor of the model: its name and shape there, and how it is stored."""

    name: str
    shape: tuple[int, ...]
    stored: MatrixFormat


@dataclass(frozen=True)
class Codec:
    """One way to store numbers: the stored tensors, how to make them and how to read them back."""

    specs: Callable[[ModelTensor], tuple[TensorSpec, ...]]
    store: Callable[[ModelTensor, Float32], dict[str, Array]]  # of some rows, to stored arrays by name
    load: Callable[[ModelTensor, Mapping[str, Array]], Float32]  # as every graph computes with it


def specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    """The stored tensors, the one of the tensor's own name first."""
    return CODECS[tensor.stored.dtype].specs(tensor)


def store(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    """The stored arrays of a tensor, or of some of its rows, by stored name."""
    return CODECS[tensor.stored.dtype].store(tensor, rows)


def load(tensor: ModelTensor, stored: Mapping[str, Array]) -> Float32:
    """The float32 tensor that the graphs compute with."""
    return CODECS[tensor.stored.dtype].load(tensor, stored)


def _plain_specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name=tensor.name, shape=tensor.shape, dtype=tensor.stored.dtype),)  # type: ignore[arg-type]


def _plain_store(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    dtype = ml_dtypes.bfloat16 if tensor.stored.dtype == "bfloat16" else tensor.stored.dtype
    return {tensor.name: rows.astype(dtype, copy=False)}


def _plain_load(tensor: ModelTensor, stored: Mapping[str, Array]) -> Float32:
    return stored[tensor.name].astype(np.float32)


def _int8_specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name=tensor.name, shape=tensor.shape, dtype="int8"),
        TensorSpec(name=tensor.name + SCALE_SUFFIX, shape=tensor.shape[:1], dtype="float32"),
    )


def _int8_store(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    """Symmetric, one scale per output channel (row): q = round(w / scale), scale = max |row| / 127; a row of zeros has scale 1."""
    largest = np.abs(rows).max(axis=1)
    scale = np.where(largest > 0, largest / np.float32(INT8_MAX), np.float32(1)).astype(np.float32)
    quantized = np.rint(rows / scale[:, None]).clip(-INT8_MAX, INT8_MAX).astype(np.int8)
    return {tensor.name: quantized, tensor.name + SCALE_SUFFIX: scale}


def _int8_load(tensor: ModelTensor, stored: Mapping[str, Array]) -> Float32:
    scale: Float32 = stored[tensor.name + SCALE_SUFFIX].astype(np.float32)
    return stored[tensor.name].astype(np.float32) * scale[:, None]


def groups(tensor: ModelTensor) -> int:
    """Scales in a row; the last group may be shorter than the others."""
    assert tensor.stored.group_size is not None
    return -(-tensor.shape[1] // tensor.stored.group_size)


def _int4_specs(tensor: ModelTensor) -> tuple[TensorSpec, ...]:
    n, k = tensor.shape
    shape = (n, groups(tensor))
    found = [
        TensorSpec(
            name=tensor.name, shape=(n, k // 2), dtype="uint8"
        ),  # two numbers a byte, the lower half first, as in ONNX
        TensorSpec(name=tensor.name + SCALE_SUFFIX, shape=shape, dtype="float16"),
    ]
    if tensor.stored.zero_points:
        found.append(TensorSpec(name=tensor.name + ZERO_POINT_SUFFIX, shape=shape, dtype="uint8"))
    return tuple(found)


def _int4_store(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    """A few rows at a time, which bounds what the search for scales holds, and keeps it in the cache."""
    count = max(INT4_SEARCH // rows.shape[1], 1)
    parts = [_int4_search(tensor, rows[start : start + count]) for start in range(0, len(rows), count)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _int4_search(tensor: ModelTensor, rows: Float32) -> dict[str, Array]:
    """Round to nearest, with each group's scale (and zero point) chosen among some to minimise the group's squared error.

    Symmetric: w = (q - 8) scale. The number with the largest magnitude can be met exactly by -8, so each candidate scale is that number over
    -8, times a shrinking factor that trades its error for that of all others. Asymmetric: w = (q - zero) scale, the candidates shrink the range.
    """
    n, k = rows.shape
    size, count = tensor.stored.group_size or k, groups(tensor)
    padded = np.zeros((n, count * size), np.float32)
    padded[:, :k] = rows
    grouped = padded.reshape(n, count, size)
    best_scale, best_zero = np.ones((n, count), np.float16), np.full((n, count), INT4_ZERO, np.uint8)
    best_error = np.full((n, count), np.inf, np.float32)
    best = np.full(grouped.shape, INT4_ZERO, np.uint8)
    for scale, zero in _int4_candidates(grouped, zero_points=tensor.stored.zero_points):
        wide = scale.astype(np.float32)[..., None]
        quantized = (np.rint(grouped / wide) + zero[..., None]).clip(0, INT4_MAX)
        error = np.square((quantized - zero[..., None]) * wide - grouped).sum(-1)
        better = error < best_error
        best_error[better], best_scale[better], best_zero[better] = error[better], scale[better], zero[better]
        best[better] = quantized[better].astype(np.uint8)
    flat: NDArray[np.uint8] = best.reshape(n, count * size)[:, :k]
    if not tensor.stored.zero_points:
        flat = flat ^ np.uint8(INT4_ZERO)  # to two's complement, as ONNX stores int4
    stored: dict[str, Array] = {tensor.name: flat[:, ::2] | flat[:, 1::2] << 4, tensor.name + SCALE_SUFFIX: best_scale}
    return stored | ({tensor.name + ZERO_POINT_SUFFIX: best_zero} if tensor.stored.zero_points else {})


SHRINK = tuple(1 - 0.03 * i for i in range(9))  # of the range that a scale covers: beyond 24 % the error only grows


def _int4_candidates(grouped: Float32, *, zero_points: bool) -> list[tuple[NDArray[np.float16], NDArray[np.float32]]]:
    """Scales and zero points (N, groups) to try; scales are what float16 can hold, and never zero."""
    smallest = float(np.finfo(np.float16).tiny)
    candidates = []
    if zero_points:
        low, high = np.minimum(grouped.min(-1), 0), np.maximum(grouped.max(-1), 0)
        for factor in SHRINK:
            scale = np.maximum((high - low) * np.float32(factor / INT4_MAX), smallest).astype(np.float16)
            candidates.append((scale, np.rint(-low * np.float32(factor) / scale.astype(np.float32)).clip(0, INT4_MAX)))
        return candidates
    largest = np.take_along_axis(grouped, np.abs(grouped).argmax(-1)[..., None], -1)[..., 0]
    for factor in (*SHRINK, *(-8 / 7 * factor for factor in SHRINK)):  # the largest number meets -8, or 7
        scale = (largest * np.float32(-factor / INT4_ZERO)).astype(np.float16)
        scale[np.abs(scale) < smallest] = smallest
        candidates.append((scale, np.full(scale.shape, INT4_ZERO, np.float32)))
    return candidates


def unpacked_int4(tensor: ModelTensor, stored: Array) -> NDArray[np.uint8]:
    """Stored bytes (N, K / 2) to numbers (N, K) from 0 to 15, of which a zero point is still to be taken."""
    data = stored.view(np.uint8)
    numbers: NDArray[np.uint8] = np.stack([data & np.uint8(15), data >> np.uint8(4)], -1).reshape(data.shape[0], -1)
    return numbers if tensor.stored.zero_points else numbers ^ np.uint8(INT4_ZERO)


def _int4_load(tensor: ModelTensor, stored: Mapping[str, Array]) -> Float32:
    k = tensor.shape[1]
    size = tensor.stored.group_size or k

    def spread(values: Array) -> Float32:
        return np.repeat(values.astype(np.float32), size, axis=1)[:, :k]

    zero = spread(stored[tensor.name + ZERO_POINT_SUFFIX]) if tensor.stored.zero_points else np.float32(INT4_ZERO)
    return (unpacked_int4(tensor, stored[tensor.name]).astype(np.float32) - zero) * spread(
        stored[tensor.name + SCALE_SUFFIX]
    )


_PLAIN = Codec(_plain_specs, _plain_store, _plain_load)
CODECS: dict[str, Codec] = {
    "float32": _PLAIN,
    "float16": _PLAIN,
    "bfloat16": _PLAIN,
    "int8": Codec(_int8_specs, _int8_store, _int8_load),
    "int4": Codec(_int4_specs, _int4_store, _int4_load),
}

SCHEMES: dict[str, Callable[[Quantization, DType], MatrixFormat]] = {  # the second argument: what backend.dtype stores
    "none": lambda _, dtype: MatrixFormat(dtype=dtype),
    "int8": lambda *_: MatrixFormat(dtype="int8"),
    "int8_dynamic": lambda *_: MatrixFormat(dtype="int8", dynamic=True),
    "int4": lambda q, _: MatrixFormat(dtype="int4", group_size=q.group_size, zero_points=not q.symmetric),
    "int4_dynamic": lambda q, _: MatrixFormat(
        dtype="int4", group_size=q.group_size, zero_points=not q.symmetric, dynamic=True
    ),
}


@dataclass(frozen=True)
class FormatRules:
    """Which format each tensor of one model gets."""

    quantization: Quantization
    dtype: DType  # of matrices that no scheme touches
    tied_embeddings: bool
    n_layers: int

    def tensor(self, name: str, shape: tuple[int, ...]) -> ModelTensor:
        """The tensor with its format."""
        return ModelTensor(name=name, shape=shape, stored=self._format(name, shape))

    def _format(self, name: str, shape: tuple[int, ...]) -> MatrixFormat:
        if len(shape) == 1 or name.endswith(ROUTER):
            return MatrixFormat(dtype="float32")  # a few kilobytes, and precision that every layer feels
        if name == "tok_embeddings.weight" and not self.tied_embeddings:
            return MatrixFormat(
                dtype=self.dtype
            )  # only one row a token is read, so a narrower store would save nothing but disk
        scheme = self.quantization.keep_scheme if self._is_kept(name) else self.quantization.scheme
        chosen = SCHEMES[scheme](self.quantization, self.dtype)
        if EXPERTS in name or (chosen.dtype == "int4" and shape[1] % INT4_MULTIPLE):
            return MatrixFormat(dtype="int8") if chosen.scaled else chosen  # what their kernels have
        if name in HEAD and chosen.dtype == "int8":
            return MatrixFormat(
                dtype="int8"
            )  # a language model's head sees one token a call and waits for memory: rounding it would gain nothing
        return chosen

    def _is_kept(self, name: str) -> bool:
        places = {
            "head": name in HEAD,
            "first": name.startswith("layers.0."),
            "last": name.startswith(f"layers.{self.n_layers - 1}."),
        }
        return any(places[place] for place in self.quantization.keep)
