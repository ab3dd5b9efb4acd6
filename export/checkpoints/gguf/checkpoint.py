"""Reads GGUF files with the package `gguf`: hyperparameters, tensors dequantized one at a time, and the tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from numpy.typing import NDArray

from export.checkpoints import families
from export.checkpoints.encodings.encoding import EncodedRows, Encoding, check_finite
from export.checkpoints.format_names import GGUF_ROPE_DIVISORS
from export.checkpoints.gguf import split as gguf_split
from export.checkpoints.gguf.blocks import BLOCK_TYPES, BlockType
from export.checkpoints.gguf.contents import check_is_model
from export.checkpoints.gguf.header import UnknownPackingError, check_header
from export.checkpoints.gguf.layers import of_layers
from export.checkpoints.gguf.rope import gguf_rotary
from export.checkpoints.gguf.tokenizer import recover
from export.checkpoints.source import Array, Opened, SourceTensor, TensorSource, matrix_shape
from runtime.artifact.tensor_file import numpy_dtype
from runtime.errors import UserError, one_line

ROWS_AT_ONCE = 1024  # of a quantized tensor; bounds the package's temporary allocations
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # read as they are; others become float32
EMBEDDING = "token_embd.weight"
MOST_PAIRS = 2**16  # of a head's dimensions; far beyond any model


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in which file, and how it is packed; `shape` is in numpy's order."""

    file: Path
    packing: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def packed_rows(name: str, tensor: GgufTensor, start: int, stop: int) -> NDArray[np.uint8]:
    """Rows of a tensor as a matrix: the bytes (n, bytes of a row) of the file."""
    row_bytes = tensor.nbytes // matrix_shape(tensor.shape)[0]
    wanted = (stop - start) * row_bytes
    data = np.fromfile(tensor.file, np.uint8, wanted, offset=tensor.offset + start * row_bytes)
    if data.nbytes != wanted:
        raise UserError(
            f"{tensor.file} has shrunk since it was opened: {name} needs {wanted} bytes, but {data.nbytes} are left"
        )
    return data.reshape(stop - start, row_bytes)


@dataclass(frozen=True)
class BlockMatrix:
    """A matrix of blocks, to be carried as they are."""

    name: str
    tensor: GgufTensor
    blocks: BlockType

    @property
    def encoding(self) -> Encoding:
        """How the blocks store numbers."""
        return self.blocks.encoding

    def read(self, rows: slice) -> EncodedRows:
        """Some rows as numbers, scales and minimums; raises `UserError` for a scale that is NaN or infinite."""
        start, stop, _ = rows.indices(matrix_shape(self.tensor.shape)[0])
        packed = packed_rows(self.name, self.tensor, start, stop)
        found = self.blocks.rows(packed, GGML_QUANT_SIZES[self.tensor.packing][1])
        check_finite(found, self.name, start)
        return found


@dataclass(frozen=True)
class GgufTensors:
    """The tensors of a GGUF, read with ordinary file reads, so that no page of its files stays mapped."""

    stored: Mapping[str, GgufTensor]

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name."""
        return {name: self._described(name, tensor) for name, tensor in self.stored.items()}

    def _described(self, name: str, tensor: GgufTensor) -> SourceTensor:
        packing = tensor.packing.name
        if packing in PLAIN:
            return SourceTensor(tensor.shape, PLAIN[packing], tensor.nbytes)
        carried = packing in BLOCK_TYPES and len(tensor.shape) > 1
        encoded = BlockMatrix(name, tensor, BLOCK_TYPES[packing]) if carried else None
        return SourceTensor(tensor.shape, "float32", tensor.nbytes, encoded, packing)

    def read(self, name: str, rows: slice) -> Array:
        """Rows of one tensor as a matrix: float32, float16 and bfloat16 as stored, others dequantized to float32."""
        tensor = self.stored[name]
        shape = matrix_shape(tensor.shape)
        start, stop, _ = rows.indices(shape[0])
        if len(shape) == 1 and tensor.packing.name not in PLAIN:  # its blocks run across what `rows` counts
            data = np.fromfile(tensor.file, np.uint8, tensor.nbytes, offset=tensor.offset)
            return np.asarray(dequantize(data, tensor.packing)[start:stop], np.float32)
        packed = packed_rows(name, tensor, start, stop)
        if tensor.packing.name in PLAIN:
            return packed.view(numpy_dtype(PLAIN[tensor.packing.name])).reshape(stop - start, *shape[1:])
        result = np.empty((stop - start, shape[1]), np.float32)
        for at in range(0, len(packed), ROWS_AT_ONCE):
            result[at : at + ROWS_AT_ONCE] = dequantize(packed[at : at + ROWS_AT_ONCE], tensor.packing)
        return result


def open_file(path: Path) -> Opened:
    """Read the headers of a GGUF, or of the only one in a folder: one file, or its parts side by side.

    Raises `UserError` for anything that is malformed or unknown.
    """
    files = gguf_split.find(path)
    headers = [_read_header(file) for file in files]
    gguf_split.check_parts(files, [keys for keys, _ in headers], [len(tensors) for _, tensors in headers])
    stored = _joined([tensors for _, tensors in headers])
    for name, tensor in stored.items():
        _check_packing(name, tensor)
    metadata, where = headers[0][0], f"the header of {files[0]}"
    check_is_model(files[0], metadata)
    architecture = metadata.get("general.architecture")
    family = families.find("gguf", architecture, where)
    values = of_layers({key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}, where)
    rows = stored[EMBEDDING].shape[0] if EMBEDDING in stored else None
    if rows is not None:
        values["vocab_size"] = rows
    if values.get("expert_count"):
        family = families.gguf_mixture(family, stored)
    source = GgufTensors(stored)
    rotary = gguf_rotary(values, _rope_divisors(source, where), where)
    return Opened(family, values, where, source, recover(metadata, where, rows), rotary=rotary)


def file_for_transformers(path: Path) -> Path | None:
    """The file of a GGUF that transformers reads too: a dense model of one file, of an architecture that it knows."""
    files = gguf_split.find(path)
    keys, _ = _read_header(files[0])
    known = keys.get("general.architecture") == "llama" and not keys.get("llama.expert_count")
    return files[0] if known and len(files) == 1 else None


def _rope_divisors(source: TensorSource, where: str) -> list[float] | None:
    """The numbers that a file divides rotary frequencies by, if it has them."""
    tensor = source.tensors.get(GGUF_ROPE_DIVISORS)
    if tensor is None:
        return None
    if len(tensor.shape) != 1 or tensor.shape[0] > MOST_PAIRS:
        raise UserError(
            f"{where} has the tensor {GGUF_ROPE_DIVISORS} of the shape {tensor.shape}, "
            "expected a number for each pair of a head's dimensions; fetch the file again"
        )
    return [float(number) for number in source.read(GGUF_ROPE_DIVISORS, slice(None))]


def _joined(parts: list[dict[str, GgufTensor]]) -> dict[str, GgufTensor]:
    """The tensors of all parts; no part may hold another's."""
    result: dict[str, GgufTensor] = {}
    for part in parts:
        for name, tensor in part.items():
            if name in result:
                raise UserError(
                    f"{tensor.file} holds the tensor {name}, which {result[name].file.name} holds too, "
                    "expected each in one part; fetch the parts again"
                )
        result |= part
    return result


class _HeaderReader(GGUFReader):
    """The package's reader, slicing a plain array: slices of a memory mapping take three times as long to make.

    A header has some hundred thousand, mostly of the vocabulary.
    """

    @property
    def data(self) -> NDArray[np.uint8]:
        """The bytes of the file, which stay mapped as long as this array is referred to."""
        return self._bytes

    @data.setter
    def data(self, mapped: NDArray[np.uint8]) -> None:
        self._bytes = np.asarray(mapped)


def _read_header(path: Path) -> tuple[dict[str, object], dict[str, GgufTensor]]:
    """All metadata, and the place of each tensor; the reader and its memory mapping are dropped."""
    try:
        check_header(path)
        reader = _HeaderReader(path)
        metadata = {
            key: field.contents() for key, field in reader.fields.items() if field.types and not key.startswith("GGUF.")
        }
        stored = {
            tensor.name: GgufTensor(
                path,
                tensor.tensor_type,
                tuple(int(n) for n in reversed(tensor.shape.tolist())),
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
    except UnknownPackingError as error:
        raise UserError(f"{path}: {error}, which cannot be unpacked; use a file of another quantization") from error
    # The package raises any of these on a damaged file.
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise UserError(f"{path} is not a complete GGUF file: {one_line(error)}; fetch it again") from error
    return metadata, stored


def _check_packing(name: str, tensor: GgufTensor) -> None:
    if tensor.packing.name not in PLAIN and not _can_unpack(tensor.packing):
        raise UserError(
            f"{tensor.file}: {name} has the type {tensor.packing.name}, which the package gguf cannot unpack; "
            "use a file of another quantization"
        )


@cache
def _can_unpack(packing: GGMLQuantizationType) -> bool:
    """Whether the package unpacks a type: it says so only by refusing to unpack a block."""
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[packing][1]), np.uint8), packing)
    except NotImplementedError:
        return False
    return True
