"""Reads GGUF files with the package `gguf`: hyperparameters, tensors dequantized one at a time, and the tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from export.checkpoints import families
from export.checkpoints.gguf_header import check_header
from export.checkpoints.gguf_rope import gguf_rotary
from export.checkpoints.gguf_tokenizer import recover
from export.checkpoints.source import Array, Opened, SourceTensor, TensorSource, matrix_shape
from runtime.artifact.tensor_file import numpy_dtype
from runtime.errors import UserError, one_line

ROWS_AT_ONCE = 1024  # of a quantized tensor; bounds the package's temporary allocations
PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # read as they are
QUANTIZED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")  # dequantized to float32
EMBEDDING = "token_embd.weight"
MOST_PAIRS = 2**16  # of a head's dimensions; far beyond any model


@dataclass(frozen=True)
class GgufTensor:
    """Where one tensor lies in the file and how it is packed; `shape` is in numpy's order."""

    packing: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GgufTensors:
    """The tensors of one GGUF file, read with ordinary file reads, so that no page of it stays mapped."""

    path: Path
    stored: Mapping[str, GgufTensor]

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name; a packing that this module cannot unpack is given as the dtype."""
        return {
            name: SourceTensor(tensor.shape, _dtype(tensor.packing), tensor.nbytes)
            for name, tensor in self.stored.items()
        }

    def read(self, name: str, rows: slice) -> Array:
        """Rows of one tensor as a matrix: float32, float16 and bfloat16 as stored, others dequantized to float32."""
        tensor = self.stored[name]
        rows_and_columns = matrix_shape(tensor.shape)
        start, stop, _ = rows.indices(rows_and_columns[0])
        if len(tensor.shape) == 1 and tensor.packing.name not in PLAIN:  # its blocks run across what `rows` counts
            data = np.fromfile(self.path, np.uint8, tensor.nbytes, offset=tensor.offset)
            return np.asarray(dequantize(data, tensor.packing)[start:stop], np.float32)
        row_bytes = tensor.nbytes // rows_and_columns[0]
        wanted = (stop - start) * row_bytes
        data = np.fromfile(self.path, np.uint8, wanted, offset=tensor.offset + start * row_bytes)
        if data.nbytes != wanted:
            raise UserError(
                f"{self.path} has shrunk since it was opened: {name} needs {wanted} bytes, but {data.nbytes} are left"
            )
        shape = (stop - start, *rows_and_columns[1:])
        if tensor.packing.name in PLAIN:
            return data.view(numpy_dtype(PLAIN[tensor.packing.name])).reshape(shape)
        packed = data.reshape(-1, row_bytes)
        result = np.empty((len(packed), tensor.shape[-1]), np.float32)
        for start in range(0, len(packed), ROWS_AT_ONCE):
            result[start : start + ROWS_AT_ONCE] = dequantize(packed[start : start + ROWS_AT_ONCE], tensor.packing)
        return result


def open_file(path: Path) -> Opened:
    """Read the header of a GGUF file, or of the only one in a folder.

    Raises `UserError` for anything that is malformed or unknown.
    """
    path = _only_file(path)
    metadata, stored = _read_header(path)
    where = f"the header of {path}"
    architecture = metadata.get("general.architecture")
    family = families.find("gguf", architecture, where)
    if metadata.get("split.count", 1) != 1:
        raise UserError(
            f"{path} is one of {metadata['split.count']} parts of a split GGUF; "
            "join them first with llama-gguf-split --merge"
        )
    values = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    if EMBEDDING in stored:
        values["vocab_size"] = stored[EMBEDDING].shape[0]
    source = GgufTensors(path, stored)
    rotary = gguf_rotary(values, _rope_divisors(source, where), where)
    return Opened(family, values, where, source, recover(metadata, where), rotary=rotary)


def _rope_divisors(source: TensorSource, where: str) -> list[float] | None:
    """The numbers that a file divides rotary frequencies by, if it has them."""
    tensor = source.tensors.get(families.GGUF_ROPE_DIVISORS)
    if tensor is None:
        return None
    if len(tensor.shape) != 1 or tensor.shape[0] > MOST_PAIRS or tensor.dtype not in PLAIN.values():
        raise UserError(
            f"{where} has the tensor {families.GGUF_ROPE_DIVISORS} of the shape {tensor.shape} and dtype "
            f"{tensor.dtype}, expected a float for each pair of a head's dimensions; fetch the file again"
        )
    return [float(number) for number in source.read(families.GGUF_ROPE_DIVISORS, slice(None))]


def _only_file(path: Path) -> Path:
    """The file itself, or the only .gguf file of a folder."""
    if path.is_file():
        return path
    found = sorted(path.glob("*.gguf"))
    if len(found) != 1:
        raise UserError(f"{path} holds {len(found)} .gguf files, expected one; set frontend.checkpoint to the file")
    return found[0]


def _read_header(path: Path) -> tuple[dict[str, object], dict[str, GgufTensor]]:
    """All metadata, and the place of each tensor; the reader and its memory mapping are dropped."""
    try:
        check_header(path)
        reader = GGUFReader(path)
        metadata = {
            key: field.contents() for key, field in reader.fields.items() if field.types and not key.startswith("GGUF.")
        }
        stored = {
            tensor.name: GgufTensor(
                tensor.tensor_type,
                tuple(int(n) for n in reversed(tensor.shape.tolist())),
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
    # The package raises any of these on a damaged file.
    except (ValueError, IndexError, KeyError, OverflowError, OSError) as error:
        raise UserError(f"{path} is not a complete GGUF file: {one_line(error)}; fetch it again") from error
    return metadata, stored


def _dtype(packing: GGMLQuantizationType) -> str:
    if packing.name in PLAIN:
        return PLAIN[packing.name]
    return "float32" if packing.name in QUANTIZED else str(packing.name)
