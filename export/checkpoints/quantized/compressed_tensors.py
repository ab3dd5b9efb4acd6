"""Reads compressed-tensors, as llm-compressor writes it: whole numbers, packed or as int8, and floats of 4 bits.

format           tensors of a matrix (N, K) besides weight_scale, which is (N, groups), (N, 1), (1,) or ()
pack-quantized   weight_packed int32 (N, K * bits / 32), weight_shape; numbers and zero points lie 2 ** (bits - 1) up
int-quantized    weight int8 (N, K)
float-quantized  weight e4m3, read by `float8`

weight_zero_point  int8 (N, groups), or packed along the rows: int32 (N * bits / 32, groups); absent if all are 0
weight_g_idx       int32 (K,)  the group of each column; absent where groups are neighbours

A weight is scale * (number - zero point): `dequantize` in compressed_tensors/quantization/lifecycle/forward.py. Groups
of settings are told apart by what the tensors show, bits and sizes, so the names that they match are not read.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.checkpoints.json_files import convert
from export.checkpoints.quantized.affine import ZeroPoints, affine_matrix, order_of
from export.checkpoints.quantized.float4 import read_float4
from export.checkpoints.quantized.matrix import Found, QuantizedMatrix
from export.checkpoints.quantized.module import FLOATS, Module, modules, unpacked
from export.checkpoints.source import Array, TensorSource
from runtime.errors import UserError

FORMATS = (
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "nvfp4-pack-quantized",
    "mxfp4-pack-quantized", "mixed-precision", "dense",
)  # fmt: skip
INTEGERS = "int"  # the type of such numbers; others are floats
STORED_AS_INT8, STORED_PACKED = "int8", "int32"
PACKED_BITS = (2, 4, 8)  # whose layout is the same in every release
WORD = 32  # bits
PACKED, PLAIN, SCALE, ZERO_POINT, GROUP_OF = (
    "weight_packed", "weight", "weight_scale", "weight_zero_point", "weight_g_idx",
)  # fmt: skip
SHAPE = "weight_shape"
QUANTIZED = (f".{PACKED}", f".{SCALE}", ".weight_scale_inv", ".compressed", ".bitmask")  # ends of their names
Size = Annotated[int, msgspec.Meta(ge=1)]


class _Weights(msgspec.Struct, frozen=True):
    num_bits: int = 8
    type: str = INTEGERS
    symmetric: bool = True
    group_size: int | None = None
    block_structure: tuple[Size, Size] | None = None


class _Group(msgspec.Struct, frozen=True):
    weights: _Weights | None = None
    format: str | None = None


class _Settings(msgspec.Struct, frozen=True):
    format: str | None = None
    config_groups: dict[str, Any] = {}
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


def read_compressed(source: TensorSource, settings: Mapping[str, object], where: str) -> Found:
    """The matrices of whole numbers and of 4-bit floats; raises `UserError` for what does not fit together."""
    if not any(name.endswith(QUANTIZED) for name in source.tensors):
        return Found()
    said = convert(settings, _Settings, f"{where}, quantization of compressed-tensors")
    groups = _groups(said, where)
    _check_formats(said, groups, where)
    integers = [group.weights for group in groups if group.weights is not None and group.weights.type == INTEGERS]
    storages = list(_storages(source, where, integers))
    matrices = {storage.module.matrix: _matrix(storage, integers) for storage in storages}
    floats = read_float4(source, where)
    return Found({**matrices, **floats.matrices})


def block_structure(settings: Mapping[str, object], where: str) -> tuple[int, int] | None:
    """The rows and columns of the blocks of 8-bit floats, if the settings give them.

    Raises `UserError` if they give several: then the tensors do not tell which of them is whose.
    """
    groups = _groups(convert(settings, _Settings, f"{where}, quantization of compressed-tensors"), where)
    found = {g.weights.block_structure for g in groups if g.weights is not None and g.weights.block_structure}
    if len(found) > 1:
        raise UserError(
            f"{where} has a compressed-tensors checkpoint with blocks of {len(found)} sizes, expected one size; "
            "set frontend.checkpoint to another checkpoint of the model"
        )
    return next(iter(found), None)


def _groups(said: _Settings, where: str) -> list[_Group]:
    """The groups of settings; the name of a preset stands for none, since no tensor is read by it."""
    return [convert(g, _Group, f"{where}, config_groups") for g in said.config_groups.values() if isinstance(g, dict)]


def _check_formats(said: _Settings, groups: list[_Group], where: str) -> None:
    sparsity = (said.sparsity_config or {}).get("format")
    named = [said.format, *(group.format for group in groups), sparsity]
    unknown = next((name for name in named if name is not None and name not in FORMATS), None)
    if unknown is not None:
        raise UserError(
            f"{where} has a compressed-tensors checkpoint of the format {unknown!r}, expected one of "
            f"{', '.join(FORMATS)}; set frontend.checkpoint to a checkpoint in one of these"
        )
    if said.transform_config and said.transform_config.get("config_groups"):
        raise UserError(
            f"{where} has a compressed-tensors checkpoint with a transform_config, whose rotations of activations are "
            "not computed here; set frontend.checkpoint to a checkpoint without them"
        )


@dataclass(frozen=True)
class CompressedStorage:
    """Reads the tensors of one matrix of whole numbers."""

    module: Module
    shape: tuple[int, int]  # (N, K)
    bits: int
    is_packed: bool

    def numbers(self, rows: slice) -> NDArray[np.uint8]:
        """As `AffineStorage` says."""
        if self.is_packed:
            return unpacked(self.module.read(PACKED, rows), self.bits, self.shape[1])
        return self.module.read(PLAIN, rows).view(np.uint8) + np.uint8(
            2 ** (self.bits - 1)
        )  # which wraps from -1 to 127

    def scales(self, rows: slice) -> Array:
        """As `AffineStorage` says; a scale for the whole matrix is each row's."""
        if not self._has_rows:
            start, stop, _ = rows.indices(self.shape[0])
            return np.broadcast_to(self.module.read(SCALE).reshape(1, 1), (stop - start, 1))
        found = self.module.read(SCALE, rows)
        return found.reshape(len(found), -1)

    @property
    def _has_rows(self) -> bool:
        """Whether there is more than one scale."""
        return self.scale_shape[:1] == self.shape[:1]

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """The shape in which scales are stored."""
        return self.module.source.tensors[self.module.of(SCALE)].shape

    @property
    def groups(self) -> int:
        """Scales in a row."""
        return self.scale_shape[1] if len(self.scale_shape) > 1 else 1

    def zero_points(self, rows: slice) -> ZeroPoints:
        """As `AffineStorage` says."""
        start, stop, _ = rows.indices(self.shape[0])
        middle = 2 ** (self.bits - 1)
        if not self.module.has(ZERO_POINT):
            return np.full((stop - start, self.groups), middle, np.int16)
        if self.module.source.tensors[self.module.of(ZERO_POINT)].dtype == STORED_AS_INT8:
            stored = self.module.read(ZERO_POINT, rows if self._has_rows else slice(None))
            found = stored.reshape(len(stored) if stored.ndim else 1, -1).astype(np.int16) + np.int16(middle)
            return np.broadcast_to(found, (stop - start, found.shape[1]))
        packed = unpacked(self.module.read(ZERO_POINT).T, self.bits, self.shape[0])
        return packed[:, rows].T.astype(np.int16)


def _storages(source: TensorSource, where: str, settings: list[_Weights]) -> Iterator[CompressedStorage]:
    for module in modules(source, where, PACKED):
        if source.tensors[module.of(PACKED)].dtype == STORED_PACKED:
            yield _packed(module, settings)
    for module in modules(source, where, SCALE):
        weight = source.tensors.get(module.matrix)
        if weight is not None and weight.dtype == STORED_AS_INT8:
            yield CompressedStorage(module, module.need(PLAIN, (STORED_AS_INT8,)), 8, is_packed=False)  # type: ignore[arg-type]


def _packed(module: Module, settings: list[_Weights]) -> CompressedStorage:
    n, words = module.need(PACKED, (STORED_PACKED,))
    module.check(SHAPE, ("int64", "int32"), (2,), "two sizes")
    rows, k = (int(size) for size in module.read(SHAPE))
    known = sorted({weights.num_bits for weights in settings})
    bits = [b for b in known if k > 0 and words == -(-k * b // WORD)]
    if rows != n or len(bits) != 1 or bits[0] not in PACKED_BITS:
        raise UserError(
            f"{module.where}: the tensor {module.of(PACKED)} has {n} rows of {words} words, but "
            f"{module.of(SHAPE)} says {rows} x {k} and config_groups {_listed(known)} bits, expected a matrix of "
            f"{_listed(PACKED_BITS)} bits that fills them; fetch the checkpoint again"
        )
    return CompressedStorage(module, (n, k), bits[0], is_packed=True)


def _listed(numbers: object) -> str:
    return " or ".join(str(number) for number in numbers) or "no"  # type: ignore[attr-defined]


def _matrix(storage: CompressedStorage, settings: list[_Weights]) -> QuantizedMatrix:
    module, (n, k) = storage.module, storage.shape
    rank = len(module.source.tensors[module.of(SCALE)].shape) if module.has(SCALE) else 2
    module.need(SCALE, FLOATS, rank)
    size = _group_size(storage, settings)
    groups = module.check_groups(k, size)
    one = storage.scale_shape in ((), (1,), (1, 1)) or storage.scale_shape == (n,)
    if not (one and groups == 1):
        module.check(SCALE, FLOATS, (n, groups), f"{n} rows of {groups} groups")
    _check_zero_points(storage, settings, groups)
    packed = "int8" if not storage.is_packed else f"{storage.bits}-bit"
    return affine_matrix(
        module,
        f"compressed-tensors {packed}",
        (n, k),
        storage,
        bits=storage.bits,
        group_size=size,
        scale=SCALE,
        stored=module.present(PACKED if storage.is_packed else PLAIN, SCALE, ZERO_POINT, GROUP_OF, SHAPE),
        order=None if _is_unordered(module) else order_of(module, GROUP_OF, k, size),
    )


def _is_unordered(module: Module) -> bool:
    """Whether all groups are -1, which stands for groups of neighbours."""
    return module.has(GROUP_OF) and bool((module.read(GROUP_OF) == -1).all())


def _group_size(storage: CompressedStorage, settings: list[_Weights]) -> int:
    """The size of groups in the settings that gives as many groups as there are scales; else the first one."""
    k = storage.shape[1]
    sizes = [w.group_size for w in settings if w.group_size and w.group_size > 0]
    fitting = [size for size in sizes if size * storage.groups == k]
    return k if storage.groups == 1 and not fitting else next(iter(fitting or sizes), k)


def _check_zero_points(storage: CompressedStorage, settings: list[_Weights], groups: int) -> None:
    module, n = storage.module, storage.shape[0]
    asymmetric = settings and not any(weights.symmetric for weights in settings)
    if not module.has(ZERO_POINT):
        if asymmetric:
            module.need(ZERO_POINT, (STORED_AS_INT8, STORED_PACKED))
        return
    tensor = module.source.tensors[module.of(ZERO_POINT)]
    if tensor.dtype == STORED_AS_INT8 and tensor.shape == storage.scale_shape:
        return
    if not storage.is_packed:
        module.refuse(ZERO_POINT, tensor, f"int8 in the shape {storage.scale_shape} of the scales")
    shape = (-(-n * storage.bits // WORD), groups)
    module.check(ZERO_POINT, (STORED_PACKED,), shape, f"zero points of {storage.bits} bits for {n} rows")
