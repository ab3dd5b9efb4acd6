"""Weights that torch has pickled (`*.pth`), through torch's weights-only loader, which runs no code from the file, mapped and not read."""

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from export.source import Array, SourceTensor
from runtime.errors import UserError


@dataclass(frozen=True)
class PthTensors:
    """The tensors of one or more files, each under one name in one file."""

    stored: Mapping[str, Any]  # tensor name -> torch.Tensor over the mapped file

    @classmethod
    def open(cls, paths: Sequence[Path]) -> "PthTensors":
        """Map the files; raises `UserError` for one that is damaged, holds more than tensors, or repeats a tensor of another."""
        stored: dict[str, Any] = {}
        for path in paths:
            loaded = _load(path)
            twice = sorted(set(stored) & set(loaded))
            if twice:
                raise UserError(f"{path} holds the tensor {twice[0]}, which another file has too, expected whole tensors, each in one file")
            stored |= loaded
        return cls(stored)

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name."""
        return {
            name: SourceTensor(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), tensor.nbytes) for name, tensor in self.stored.items()
        }

    def read(self, name: str, rows: slice) -> Array:
        """Rows of one tensor, as stored, copied out of the mapping."""
        import torch

        part = self.stored[name][rows].contiguous()
        if part.dtype == torch.bfloat16:
            return np.array(part.view(torch.uint16).numpy()).view(ml_dtypes.bfloat16)
        return np.array(part.numpy())


def _load(path: Path) -> dict[str, Any]:
    """Tensors by name from one file."""
    import torch  # here, so that reading other formats does not wait for it

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} is not a file of tensors alone that torch can map: {reason}; fetch it again, or as safetensors") from error
    if not isinstance(loaded, dict) or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in loaded.items()):
        raise UserError(f"{path} holds something other than tensors by name, expected a state dict; fetch the checkpoint as safetensors")
    return loaded
