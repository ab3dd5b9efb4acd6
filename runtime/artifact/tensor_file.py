"""The safetensors format, read strictly and written tensor by tensor, with every tensor 64-byte aligned.

A file is an 8-byte little-endian length N, N bytes of JSON, and the data. The JSON maps each name to `dtype`, `shape`
and `data_offsets` (begin and end, counted from the first byte after the JSON); the key `__metadata__` holds strings.
The tensors MUST cover the data without gaps or overlaps, as the `safetensors` package demands. Our writer's additions
stay within those rules: the JSON is padded with spaces so that the data begins at a multiple of 64, and each tensor
whose size is not a multiple of 64 is followed by a uint8 tensor named `__padding__.I`, which our reader hides.
"""

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, BinaryIO, Self, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import TensorSpec, WeightSpec
from runtime.errors import UserError

ALIGNMENT = 64  # bytes; TVM's generated CPU code assumes it of every tensor
HEADER_LIMIT = 100_000_000  # bytes; the limit of the `safetensors` package
METADATA = "__metadata__"
PADDING = "__padding__."
DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
# Dtypes of the package `ml_dtypes`, which the inference box lacks, and numpy's for their bits.
BITS = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8"}
CODES = {dtype: code for code, dtype in DTYPES.items()}
Array = NDArray[Any]
T = TypeVar("T")


@dataclass(frozen=True)
class StoredTensor:
    """The place of one tensor: `offset` counts from the start of the file, `dtype` is numpy's name or "bfloat16"."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file whose header has been read and checked; its data is read on demand."""

    path: Path
    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, path: Path) -> Self:
        """Read and check the header; raises `UserError` for any violation of the format, before any data is read."""
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                file.seek(0)
                header, data_start = _read_header(file, path, size)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        metadata = _convert(header.pop(METADATA, {}), dict[str, str], path, METADATA)
        entries = {name: _convert(value, _Entry, path, name) for name, value in header.items()}
        tensors = [_stored(name, entry, data_start, path) for name, entry in entries.items()]
        _check_cover(tensors, data_start, size, path)
        return cls(path, {tensor.name: tensor for tensor in tensors if not tensor.name.startswith(PADDING)}, metadata)

    def read(self, name: str, rows: slice = slice(None)) -> Array:
        """Read one tensor, or `rows` of its first axis, as a copy, so that no page of the file stays mapped.

        bfloat16 is returned as `ml_dtypes.bfloat16`. Raises `UserError` if the file has become shorter.
        """
        tensor = self.tensors[name]
        start, stop, _ = rows.indices(tensor.shape[0] if tensor.shape else 1)
        row_bytes = tensor.nbytes // max(tensor.shape[0], 1) if tensor.shape else tensor.nbytes
        wanted = (stop - start) * row_bytes
        data = np.fromfile(self.path, np.uint8, wanted, offset=tensor.offset + start * row_bytes)
        if data.nbytes != wanted:
            raise UserError(
                f"{self.path} has shrunk since it was opened: {name} needs {wanted} bytes, but {data.nbytes} are left"
            )
        return data.view(numpy_dtype(tensor.dtype)).reshape((stop - start, *tensor.shape[1:]) if tensor.shape else ())

    def map(self) -> dict[str, Array]:
        """Every tensor as a view of one private mapping (writes stay in memory), without a copy.

        The mapping is copy-on-write because DLPack refuses read-only arrays.
        """
        return self.views(np.memmap(self.path, np.uint8, "c").view(np.ndarray))

    def views(self, whole: Array) -> dict[str, Array]:
        """Every tensor as a view of `whole`, the bytes of the file, from an aligned address on.

        bfloat16 is returned as its bits in uint16, since numpy by itself has no bfloat16 to export. Raises `UserError`
        if a tensor is not aligned within the file.
        """
        for tensor in self.tensors.values():
            if tensor.offset % ALIGNMENT:
                place = f"{self.path}: {tensor.name} begins at byte {tensor.offset}"
                raise UserError(f"{place}, expected a multiple of {ALIGNMENT}; compile the artifact again")
        return {
            name: whole[tensor.offset : tensor.offset + tensor.nbytes]
            .view(bits_dtype(tensor.dtype))
            .reshape(tensor.shape)
            for name, tensor in self.tensors.items()
        }


@dataclass
class TensorFileWriter:
    """Writes an aligned safetensors file, a tensor or some of its rows at a time, with the tensors in any order.

    The specs alone determine the place of every tensor in the file. This is a context manager; leaving it before every
    tensor has been written is our own mistake and raises `AssertionError`.
    """

    path: Path
    specs: Sequence[TensorSpec | WeightSpec]
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._header, self._layout, self._nbytes = _plan(self.specs, self.metadata)
        self._written = {spec.name: 0 for spec in self.specs}  # bytes
        self._file: BinaryIO | None = None

    @property
    def nbytes(self) -> int:
        """Size of the whole file."""
        return self._nbytes

    def __enter__(self) -> Self:
        self._file = self.path.open("wb")
        self._file.write(self._header)
        self._file.truncate(self.nbytes)  # padding is zero without being written
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        self._file.close()
        missing = sorted(name for name, written in self._written.items() if written < self._layout[name].nbytes)
        assert kind is not None or not missing, f"{self.path}: not fully written: {missing}"

    def leave_zero(self) -> None:
        """Leave whatever has not been written as zeros, which take no space on most file systems."""
        self._written = {name: tensor.nbytes for name, tensor in self._layout.items() if name in self._written}

    def write(self, name: str, array: Array) -> None:
        """Write a tensor, or its next rows, at their place; dtype and row shape must match its spec."""
        assert self._file is not None, f"{self.path} is not open"
        assert name in self._layout, f"{self.path}: {name} is not in the specs"
        tensor, written = self._layout[name], self._written[name]
        assert array.shape[1:] == tensor.shape[1:], (
            f"{name} has rows of shape {array.shape[1:]}, expected {tensor.shape[1:]}"
        )
        assert str(array.dtype) == tensor.dtype, f"{name} has dtype {array.dtype}, expected {tensor.dtype}"
        assert written + array.nbytes <= tensor.nbytes, (
            f"{name} gets {written + array.nbytes} bytes, expected {tensor.nbytes}"
        )
        self._file.seek(tensor.offset + written)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._written[name] = written + array.nbytes


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor's entry in the header, as the file has it."""

    dtype: str
    shape: tuple[Annotated[int, msgspec.Meta(ge=0, le=2**48)], ...]
    data_offsets: tuple[Annotated[int, msgspec.Meta(ge=0, le=2**62)], Annotated[int, msgspec.Meta(ge=0, le=2**62)]]


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a stored dtype; those in `BITS` need a package that the inference box lacks."""
    if name in BITS:
        import ml_dtypes

        found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
        return found
    return np.dtype(name)


def bits_dtype(name: str) -> np.dtype[Any]:
    """The dtype in which numpy alone, and kernels, take a stored dtype: of those in `BITS`, that of their bits."""
    return np.dtype(BITS.get(name, name))


def tensor_bytes(spec: TensorSpec | WeightSpec) -> int:
    """Bytes of a tensor."""
    return prod(spec.shape) * _itemsize(spec.dtype)


def _itemsize(dtype: str) -> int:
    return bits_dtype(dtype).itemsize


def _read_header(file: BinaryIO, path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header's JSON object and the offset of the first data byte."""
    if size < 8:
        raise UserError(f"{path} is not a safetensors file: it has {size} bytes, expected at least 8; fetch it again")
    (length,) = struct.unpack("<Q", file.read(8))
    if length > HEADER_LIMIT:
        raise UserError(
            f"{path} is not a safetensors file: its header would have {length} bytes, "
            f"but the limit is {HEADER_LIMIT}; fetch it again"
        )
    if 8 + length > size:
        raise UserError(
            f"{path} is truncated: its header ends at byte {8 + length}, but the file has {size}; fetch it again"
        )
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_no_duplicates)
        json.dumps(header, ensure_ascii=False).encode()  # refuses a lone surrogate, which no name may contain
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a header that is not valid JSON: {error}; fetch it again") from error
    if not isinstance(header, dict):
        raise UserError(f"{path} has a header that is a {type(header).__name__}, expected an object; fetch it again")
    return header, 8 + length


def _no_duplicates(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"the name {key!r} appears twice")
        result[key] = value
    return result


def _convert(value: object, kind: type[T], path: Path, name: str) -> T:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: the header's entry {name!r} is malformed: {error}; fetch the file again") from error


def _stored(name: str, entry: _Entry, data_start: int, path: Path) -> StoredTensor:
    """The tensor of one entry, after checking that its dtype is known and its size follows from its shape."""
    if entry.dtype not in DTYPES:
        raise UserError(f"{path}: {name} has dtype {entry.dtype!r}, expected one of {', '.join(DTYPES)}")
    dtype = DTYPES[entry.dtype]
    begin, end = entry.data_offsets
    nbytes = prod(entry.shape) * _itemsize(dtype)
    if end - begin != nbytes:
        expected = f"expected {nbytes} for {entry.dtype} of shape {list(entry.shape)}"
        raise UserError(f"{path}: {name} spans {end - begin} bytes, {expected}; fetch the file again")
    return StoredTensor(name, dtype, entry.shape, data_start + begin, nbytes)


def _check_cover(tensors: Sequence[StoredTensor], data_start: int, size: int, path: Path) -> None:
    """Check that the tensors cover the data exactly: no gap, no overlap, nothing missing, nothing left over."""
    position = data_start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if tensor.offset != position:
            fault = "overlaps the tensor before it" if tensor.offset < position else "follows a gap"
            raise UserError(
                f"{path}: {tensor.name} begins at byte {tensor.offset} and {fault}, "
                f"expected byte {position}; fetch the file again"
            )
        position += tensor.nbytes
    if position != size:
        fault = "is truncated" if size < position else "has bytes that belong to no tensor"
        raise UserError(
            f"{path} {fault}: it has {size} bytes, but its header describes {position}; fetch the file again"
        )


def _plan(
    specs: Sequence[TensorSpec | WeightSpec], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, StoredTensor], int]:
    """The header's bytes, each tensor's place in the file, and the file's size; they depend only on the arguments."""
    entries: dict[str, Any] = {METADATA: dict(sorted(metadata.items()))} if metadata else {}
    places: dict[str, tuple[int, int]] = {}
    position = 0
    for index, spec in enumerate(specs):
        assert spec.name not in entries, f"{spec.name} appears twice"
        assert not spec.name.startswith(PADDING), f"{spec.name} is reserved for padding"
        end = position + tensor_bytes(spec)
        entries[spec.name] = {"dtype": CODES[spec.dtype], "shape": list(spec.shape), "data_offsets": [position, end]}
        places[spec.name] = (position, end)
        position = end + -end % ALIGNMENT
        if position > end:
            entries[f"{PADDING}{index}"] = {"dtype": "U8", "shape": [position - end], "data_offsets": [end, position]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    start = 8 + len(text)
    header = struct.pack("<Q", len(text)) + text
    layout = {
        s.name: StoredTensor(s.name, s.dtype, s.shape, start + places[s.name][0], places[s.name][1] - places[s.name][0])
        for s in specs
    }
    return header, layout, start + position
