"""Reads weights pickled by torch (`*.pth`) with its weights-only loader: maps the file and runs no code from it."""

import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from export.checkpoints.source import Array, SourceTensor
from runtime.errors import UserError

CODE = re.compile(r"GLOBAL (\S+)")  # how torch's loader names the code that a file would call
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
        """Rows of one tensor, as stored, copied out of the mapping."""
        import torch

        part = self.stored[name][rows].contiguous()
        if part.dtype == torch.bfloat16:
            return np.array(part.view(torch.uint16).numpy()).view(ml_dtypes.bfloat16)
        return np.array(part.numpy())


def _load(path: Path) -> dict[str, Any]:
    """Load the tensors of one file, by name."""
    import torch  # here, so that reading other formats does not wait for it

    _check_container(path)
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
    return {name: tensor.detach() for name, tensor in loaded.items()}


def _check_container(path: Path) -> None:
    """Check that a file is a zip archive, as torch saves since release 1.6, complete with the directory at its end.

    Older files hold code and data in one stream.
    """
    try:
        with path.open("rb") as file:
            complete = zipfile.is_zipfile(file)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except zipfile.BadZipFile:  # is_zipfile raises this for some damage and returns False for the rest
        complete = False
    if not complete:
        raise UserError(
            f"{path} is truncated or not a zip file of tensors, as torch saves them; fetch it again, or as safetensors"
        )


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
