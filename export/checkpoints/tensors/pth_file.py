"""Reads weights pickled by torch (`*.pth`) with its weights-only loader: maps the file and runs no code from it."""

import re
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from export.checkpoints.source import Array, SourceTensor, matrix_shape
from runtime.artifact.tensor_file import BITS, numpy_dtype
from runtime.errors import UserError

CODE = re.compile(r"GLOBAL (\S+)")  # how torch's loader names the code that a file would call
NUMBERS = re.compile(r"^[^/]+/data/[^/]+$")  # names of the records that hold a storage's numbers
# A record's local header: its signature, the compression, and the lengths of its name and of an extra field.
BEFORE_1_6 = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how files of older releases begin: a pickled number
LOCAL, LOCAL_SIGNATURE = struct.Struct("<4s4xH16xHH"), b"PK\3\4"
REASON_LENGTH = 160  # characters of torch's reason that are shown


@dataclass(frozen=True)
class PthTensors:
    """The tensors of one or more files; each tensor lies whole in one file."""

    stored: Mapping[str, Any]  # tensor name -> torch.Tensor over the mapped file

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "PthTensors":
        """Map the files; raises `UserError` if one is damaged, holds more than tensors, or repeats another's tensor."""
        stored: dict[str, Any] = {}
        for path in paths:
            loaded = _load(path)
            twice = sorted(set(stored) & set(loaded))
            if twice:
                raise UserError(
                    f"{path} holds the tensor {twice[0]}, which another file holds too, "
                    "expected whole tensors, each in one file"
                )
            stored |= loaded
        return cls(stored)

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name."""
        return {
            name: SourceTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.nbytes)
            for name, tensor in self.stored.items()
        }

    def read(self, name: str, rows: slice) -> Array:
        """Rows of one tensor as a matrix, as stored, copied out of the mapping."""
        import torch

        tensor = self.stored[name]
        matrix = tensor.reshape(matrix_shape(tuple(tensor.shape)))
        part = (matrix[rows] if matrix.ndim else matrix).contiguous()
        dtype = self.tensors[name].dtype
        if dtype in BITS:  # numpy knows only their bits
            return np.array(part.view(getattr(torch, BITS[dtype])).numpy()).view(numpy_dtype(dtype))
        return np.array(part.numpy())


def _load(path: Path) -> dict[str, Any]:
    """Load the tensors of one file, by name."""
    import torch  # here, so that reading other formats does not wait for it

    records = _check_container(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # about a damaged file, which the error reports in one sentence
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # the loader interprets the file's bytes and may raise anything
        raise UserError(f"{path} {_reason(error)}; fetch it again, or as safetensors") from error
    if not isinstance(loaded, dict) or not all(
        isinstance(name, str) and _is_plain(value) for name, value in loaded.items()
    ):
        raise UserError(
            f"{path} holds something other than named tensors, expected a state dict; "
            "fetch the checkpoint as safetensors"
        )
    _check_storages(loaded, records, path)
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _check_storages(tensors: Mapping[str, Any], records: Mapping[int, int], path: Path) -> None:
    """Check that the numbers of all tensors lie in records of exactly their sizes.

    torch takes a storage's size from the pickle and only its place from the record, so it would read on into whatever
    lies behind. `records` maps where the records of numbers begin to their sizes.
    """
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    held = sorted((address, size) for address, size in storages.items() if size)
    stored = sorted((place, size) for place, size in records.items() if size)
    distances = {address - place for (address, _), (place, _) in zip(held, stored, strict=False)}
    if [size for _, size in held] != [size for _, size in stored] or len(distances) > 1:
        raise UserError(
            f"{path} holds {len(stored)} records of {sum(records.values())} bytes for {len(held)} tensors of "
            f"{sum(storages.values())}, expected one record of its size for each tensor; fetch it again"
        )


def _check_container(path: Path) -> dict[int, int]:
    """Check that a file is a zip archive, as torch saves since release 1.6, complete with the directory at its end.

    Every record must be stored as it is, in a place of its own: records are mapped as numbers, so a compressed one
    would be read as other numbers. Older files hold code and data in one stream. Returns where each record of numbers
    begins, and its size.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        with path.open("rb") as file:
            if file.read(len(BEFORE_1_6)) == BEFORE_1_6:
                raise UserError(
                    f"{path} is in the form of torch before release 1.6, which is not read; fetch the checkpoint as "
                    "safetensors"
                ) from error
        raise UserError(
            f"{path} is truncated or not a zip file of tensors, as torch saves them; fetch it again, or as safetensors"
        ) from error
    numbers = {}
    end = 0
    for record in sorted(records, key=lambda record: record.header_offset):
        if record.compress_type != zipfile.ZIP_STORED or record.compress_size != record.file_size:
            raise UserError(
                f"{path} holds the compressed record {record.filename!r}, expected records stored as torch.save "
                "stores them; save it again, or fetch it as safetensors"
            )
        if record.header_offset < end:
            raise UserError(f"{path} holds the record {record.filename!r}, which overlaps another; fetch it again")
        begin = _data_offset(path, record)
        if begin is None:
            raise UserError(f"{path} holds the record {record.filename!r}, whose header is damaged; fetch it again")
        end = begin + record.file_size
        if NUMBERS.search(record.filename):
            numbers[begin] = record.file_size
    return numbers


def _data_offset(path: Path, record: zipfile.ZipInfo) -> int | None:
    """Where a record's bytes begin: behind its local header, which has a name and an extra field of any length.

    None if that header is not one, or says something else than the directory at the end of the file.
    """
    with path.open("rb") as file:
        file.seek(record.header_offset)
        header = file.read(LOCAL.size).ljust(LOCAL.size, b"\0")
        signature, compression, length, extra = LOCAL.unpack(header)
        name = file.read(length)
    same = signature == LOCAL_SIGNATURE and compression == zipfile.ZIP_STORED and name == record.orig_filename.encode()
    return record.header_offset + LOCAL.size + int(length) + int(extra) if same else None


def _is_plain(value: object) -> bool:
    """Whether the value is a tensor with a number for each element: not sparse, quantized, or without data."""
    import torch

    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and not value.is_quantized
        and value.device.type == "cpu"
    )


def _reason(error: Exception) -> str:
    """Why torch did not load a file; torch's own message would advise running the code inside."""
    code = CODE.search(str(error))
    if code:
        return f"would run {code[1]} when it is loaded, expected only tensors; none of its code was run"
    said = str(error).strip().partition("\n")[0].partition(". ")[0]
    told = "" if "weights_only" in said or not said else f" ({said[:REASON_LENGTH]})"
    return f"is a damaged file of tensors{told}"
