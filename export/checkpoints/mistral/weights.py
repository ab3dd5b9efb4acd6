"""Finds and opens the weights of Mistral's own format: consolidated.safetensors or its shards, .pth and .pt files.

The first release of Mixtral (`consolidated.00.pt` to `.07.pt`) stacks a layer's experts by rows under the names
`block_sparse_moe.w1`, `w2` and `w3`, with w2 transposed; `convert_mixtral_weights_to_hf.py` of transformers reads it.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.checkpoints.advice import advice_on_folder
from export.checkpoints.source import TensorSource
from export.checkpoints.tensors.joined_tensors import open_weights
from export.checkpoints.tensors.pth_file import PthTensors
from export.checkpoints.tensors.weight_files import WeightFiles, find_weights
from runtime.artifact.manifest import EXPERT_LIMIT
from runtime.errors import UserError

SAFETENSORS = "consolidated.safetensors"
PICKLED_PATTERNS = ("consolidated.*.pth", "consolidated.*.pt")
STACKED = re.compile(r"(?P<layer>layers\.[0-9]+)\.block_sparse_moe\.(?P<matrix>w[123])")
ROUTER = re.compile(r"(?P<layer>layers\.[0-9]+)\.block_sparse_moe\.gate\.weight")


def find_raw_weights(folder: Path) -> WeightFiles | None:
    """The files with the weights of a folder in Mistral's own format, or None.

    Raises `UserError` if the folder has more than one form of them.
    """
    safetensors = find_weights(folder, "consolidated", ".safetensors")
    pickled = [sorted(path.name for path in folder.glob(pattern)) for pattern in PICKLED_PATTERNS]
    forms = [names for names in ((safetensors.names if safetensors else ()), *pickled) if names]
    if len(forms) > 1:
        raise UserError(f"{folder} has both {forms[0][0]} and {forms[1][0]}, expected one of them; remove the other")
    if safetensors or not forms:
        return safetensors
    return WeightFiles(folder, tuple(forms[0]))


def open_raw_weights(folder: Path) -> tuple[TensorSource, tuple[str, ...]]:
    """The tensors of a folder in Mistral's own format under the names of today, and notes on what was chosen."""
    found = find_raw_weights(folder)
    if found is None:
        advice = advice_on_folder(folder)
        if advice:
            raise UserError(advice)
        raise UserError(f"{folder} has neither {SAFETENSORS} nor {PICKLED_PATTERNS[0]}; fetch the checkpoint again")
    if found.names[0].endswith(".safetensors"):
        return open_weights(found)
    return PthTensors(_with_single_experts(PthTensors.open(found.paths).stored, folder)), ()


def _with_single_experts(stored: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The tensors (torch.Tensor), with stacked experts as views of one matrix each."""
    result: dict[str, Any] = {}
    for name, tensor in stored.items():
        router, stacked = ROUTER.fullmatch(name), STACKED.fullmatch(name)
        if router:
            result[f"{router['layer']}.feed_forward.gate.weight"] = tensor
        elif stacked:
            result |= _experts(stacked["layer"], stacked["matrix"], tensor, stored, folder)
        else:
            result[name] = tensor
    return result


def _experts(
    layer: str,
    matrix: str,
    stack: Any,  # noqa: ANN401 (a torch.Tensor; torch is not imported here)
    stored: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """The matrices of a layer's experts, by name; `stack` has the shape (n_experts * hidden_dim, dim)."""
    router = stored.get(f"{layer}.block_sparse_moe.gate.weight")
    n_experts = 0 if router is None or router.ndim != 2 else len(router)
    if not 1 <= n_experts <= EXPERT_LIMIT or stack.ndim != 2 or len(stack) % n_experts:
        raise UserError(
            f"{folder}: {layer}.block_sparse_moe.{matrix} has shape {tuple(stack.shape)} for {n_experts} experts, "
            "expected the same number of rows for each; fetch the checkpoint again"
        )
    return {
        f"{layer}.feed_forward.experts.{e}.{matrix}.weight": rows.T if matrix == "w2" else rows
        for e, rows in enumerate(stack.chunk(n_experts))
    }
