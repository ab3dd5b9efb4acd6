"""Golden prompts: token ids and the model's expected answers to them.

The compile host computes the answers with a different implementation from the artifact's. They are stored in a
safetensors file beside the weights. Prompt I has `ids.I` int64 (n,) and `outputs.I` float32 (rows, n_outputs). If the
model generates text, it also has `next.I` int64 (steps,), the greedy tokens, and the rows are the logits after the
prompt and after each of those tokens. Otherwise the rows are the head's outputs for the whole prompt.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import ModelConfig, Shape
from runtime.artifact.tensor_file import TensorFile
from runtime.errors import UserError

GOLDEN_FILE = "golden.safetensors"
MAX_TOKENS = 300  # of a prompt
PAST_THE_END = 5  # tokens beyond a window or a chunk


@dataclass(frozen=True)
class GoldenPrompt:
    """One prompt and its answer, as the module docstring describes."""

    ids: NDArray[np.int64]
    outputs: NDArray[np.float32]
    next_ids: NDArray[np.int64]  # empty if the model generates no text


def sequence_length(model: ModelConfig, shape: Shape, room: int | None) -> int:
    """Tokens to feed: past the smallest cache if `MAX_TOKENS` allows, otherwise past the largest chunk.

    Never more than fit.
    """
    smallest = min(model.cache_lens(shape.cache_len))
    affordable = [n + PAST_THE_END for n in (smallest, shape.prefill_chunks[0]) if n + PAST_THE_END <= MAX_TOKENS]
    wanted = affordable[0] if affordable else MAX_TOKENS
    return wanted if room is None else min(wanted, room)


def tensors_of(prompts: list[GoldenPrompt]) -> dict[str, NDArray[np.int64] | NDArray[np.float32]]:
    """The file's tensors by name."""
    tensors: dict[str, NDArray[np.int64] | NDArray[np.float32]] = {}
    for i, prompt in enumerate(prompts):
        tensors[f"ids.{i}"] = prompt.ids
        tensors[f"outputs.{i}"] = prompt.outputs
        if prompt.next_ids.size:
            tensors[f"next.{i}"] = prompt.next_ids
    return tensors


def read_golden(path: Path) -> list[GoldenPrompt]:
    """Read the prompts of a file; raises `UserError` for tensors that are not golden prompts."""
    file = TensorFile.open(path)
    prompts: list[GoldenPrompt] = []
    while f"ids.{len(prompts)}" in file.tensors:
        names = [f"{part}.{len(prompts)}" for part in ("ids", "outputs", "next")]
        ids, outputs, next_ids = (file.read(name) if name in file.tensors else np.empty(0, np.int64) for name in names)
        found = [(str(array.dtype), array.ndim) for array in (ids, outputs, next_ids)]
        if found != [("int64", 1), ("float32", 2), ("int64", 1)] or (
            next_ids.size and len(outputs) != next_ids.size + 1
        ):
            raise UserError(f"{path}: {names} are not a golden prompt; copy the artifact again or ship it again")
        prompts.append(
            GoldenPrompt(np.asarray(ids, np.int64), np.asarray(outputs, np.float32), np.asarray(next_ids, np.int64))
        )
    if not prompts:
        raise UserError(f"{path} holds no golden prompt; copy the artifact again or ship it again")
    return prompts
