"""Reads an adapter as mistral-finetune saves it: lora.safetensors under Mistral's own names, beside params.json.

Its `utils/merge_lora.py` merges it: matrices change by scaling * B @ A, and norms are replaced.
"""

import re
from pathlib import Path
from typing import Annotated

import msgspec

from export.checkpoints.adapters.lora import Adapter, LowRank
from export.checkpoints.advice import OWN_ADAPTER
from export.checkpoints.json_files import convert, read_json
from export.checkpoints.tensors.joined_tensors import open_tensor_file
from runtime.errors import UserError

PARAMS_FILE = "params.json"
DEFAULT_SCALING = 2.0  # that of mistral-finetune and mistral-inference
DOWN = re.compile(r"(?P<module>.+)\.lora_A\.weight")


class _Training(msgspec.Struct, frozen=True):
    scaling: Annotated[float, msgspec.Meta(gt=0, le=1e30)] = DEFAULT_SCALING


class _Params(msgspec.Struct, frozen=True):
    lora: _Training | None = None


def finetune_files(folder: Path) -> tuple[Path, ...]:
    """The adapter's tensors and, if it is there, the file with its scaling."""
    params = folder / PARAMS_FILE
    return (folder / OWN_ADAPTER, *((params,) if params.is_file() else ()))


def open_finetune(folder: Path) -> Adapter:
    """Read an adapter's scaling and the headers of its tensors; raises `UserError` for half a pair of matrices."""
    weights, *params = finetune_files(folder)
    training = convert(read_json(params[0]), _Params, params[0]).lora if params else None
    scaling = (training or _Training()).scaling
    source = open_tensor_file(weights)
    changes = {
        f"{match['module']}.weight": LowRank(name, f"{match['module']}.lora_B.weight", scaling)
        for name in source.tensors
        if (match := DOWN.fullmatch(name))
    }
    paired = {name for change in changes.values() for name in (change.down, change.up)}
    replacements = {name: name for name in source.tensors if name not in paired}
    alone = sorted((paired - set(source.tensors)) | {name for name in replacements if "lora_" in name})
    if alone:
        raise UserError(
            f"{weights} has no pair of matrices around {alone[0]}, expected lora_A and lora_B; fetch it again"
        )
    return Adapter(folder, source, changes, replacements)
