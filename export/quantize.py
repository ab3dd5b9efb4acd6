"""Weight storage: how each scheme stores a matrix, and the exact inverse. The same numbers go into ONNX and into the artifact.

Every scheme stores row by row, so that a tensor can be stored a few rows at a time. A new scheme is a row in `SCHEMES` and its functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from export.graphs import GraphsRecord
from runtime.manifest import TensorSpec

Array = NDArray[np.generic]
SCALE_SUFFIX = "_scale"
ROUTER = ".feed_forward.gate.weight"
INT8_MAX = 127  # symmetric: -128 is left unused, so that negation is exact
STORAGE = {"fp32": "float32", "fp16": "float16"}  # backend.dtype to the stored dtype of matrices and caches


@dataclass(frozen=True)
class Scheme:
    """One recipe: the tensors that hold a (N, K) matrix, how to make them and how to read them back."""

    name: str
    specs: Callable[[str, tuple[int, ...], str], tuple[TensorSpec, ...]]  # (name, shape, dtype) to stored tensors
    store: Callable[[str, NDArray[np.float32], str], dict[str, Array]]  # (name, weight, dtype) to stored arrays by name
    load: Callable[[str, Mapping[str, Array]], NDArray[np.float32]]  # the matrix as float32, as every graph computes with it


def _plain_specs(name: str, shape: tuple[int, ...], dtype: str) -> tuple[TensorSpec, ...]:
    return (TensorSpec(name=name, shape=shape, dtype=dtype),)  # type: ignore[arg-type]


def _plain_store(name: str, weight: NDArray[np.float32], dtype: str) -> dict[str, Array]:
    return {name: weight.astype(dtype, copy=False)}


def _plain_load(name: str, stored: Mapping[str, Array]) -> NDArray[np.float32]:
    return stored[name].astype(np.float32)


def _int8_specs(name: str, shape: tuple[int, ...], _dtype: str) -> tuple[TensorSpec, ...]:
    return TensorSpec(name=name, shape=shape, dtype="int8"), TensorSpec(name=name + SCALE_SUFFIX, shape=shape[:1], dtype="float32")


def _int8_store(name: str, weight: NDArray[np.float32], _dtype: str) -> dict[str, Array]:
    """Symmetric, one scale per output channel (row): q = round(w / scale), scale = max |row| / 127; a row of zeros has scale 1."""
    largest = np.abs(weight).max(axis=1)
    scale = np.where(largest > 0, largest / np.float32(INT8_MAX), np.float32(1)).astype(np.float32)
    quantized = np.rint(weight / scale[:, None]).clip(-INT8_MAX, INT8_MAX).astype(np.int8)
    return {name: quantized, name + SCALE_SUFFIX: scale}


def _int8_load(name: str, stored: Mapping[str, Array]) -> NDArray[np.float32]:
    scale: NDArray[np.float32] = stored[name + SCALE_SUFFIX].astype(np.float32)
    return stored[name].astype(np.float32) * scale[:, None]


SCHEMES: dict[str, Scheme] = {
    "none": Scheme("none", _plain_specs, _plain_store, _plain_load),
    "int8": Scheme("int8", _int8_specs, _int8_store, _int8_load),
}


@dataclass(frozen=True)
class WeightStorage:
    """How one checkpoint's tensors are stored under a scheme and a dtype."""

    scheme: str  # a row of SCHEMES
    dtype: str  # "float32" or "float16": matrices that the scheme leaves alone
    tied_embeddings: bool

    @classmethod
    def of(cls, record: GraphsRecord) -> "WeightStorage":
        """The storage that exported graphs were made with."""
        return cls(record.scheme, record.dtype, record.model.tied_embeddings)

    def _recipe(self, name: str, rank: int) -> tuple[Scheme, str]:
        if rank == 1:
            return SCHEMES["none"], "float32"  # norms: a few kilobytes, and precision that every layer feels
        if name.endswith(ROUTER):
            return SCHEMES["none"], "float32"  # a few kilobytes that decide which experts compute
        if name == "tok_embeddings.weight" and not self.tied_embeddings:
            return SCHEMES["none"], self.dtype  # only one row a token is read, so a narrower store would save nothing but disk
        return SCHEMES[self.scheme], self.dtype

    def specs(self, name: str, shape: tuple[int, ...]) -> tuple[TensorSpec, ...]:
        """The tensors that store the model's tensor `name`, the tensor of that name first."""
        recipe, dtype = self._recipe(name, len(shape))
        return recipe.specs(name, shape, dtype)

    def store(self, name: str, weight: NDArray[np.float32]) -> dict[str, Array]:
        """The stored arrays of one tensor, or of some of its rows, by stored name."""
        recipe, dtype = self._recipe(name, weight.ndim)
        return recipe.store(name, weight, dtype)

    def load(self, name: str, rank: int, stored: Mapping[str, Array]) -> NDArray[np.float32]:
        """The float32 tensor that the graphs compute with."""
        recipe, _ = self._recipe(name, rank)
        return recipe.load(name, stored)
