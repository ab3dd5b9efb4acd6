"""Tensor names without what training wrappers put into them."""

from collections.abc import Mapping
from pathlib import Path

from export.checkpoints.source import TensorSource
from export.checkpoints.tensors.renamed_tensors import RenamedTensors
from runtime.errors import UserError

PREFIXES = {  # before every name -> the wrapper that leaves it
    "module.": "torch's DataParallel",
    "base_model.model.": "peft",
}
INFIXES = {  # anywhere in a name -> the wrapper that leaves it
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "torch's FSDP",
    "_checkpoint_wrapped_module.": "torch's checkpoint wrapper",
}


def with_plain_names(source: TensorSource, folder: Path) -> tuple[TensorSource, tuple[str, ...]]:
    """The tensors as the model itself names them, and a note if wrappers had changed the names.

    Raises `UserError` if two tensors would get the same name.
    """
    names = {name: name for name in source.tensors}
    wrappers: list[str] = []
    for infix, wrapper in INFIXES.items():
        if any(infix in name for name in names):
            names = _renamed(names, {name: name.replace(infix, "") for name in names}, infix, folder)
            wrappers.append(f"{infix!r} of {wrapper}")
    for prefix, wrapper in PREFIXES.items():
        if names and all(name.startswith(prefix) for name in names):
            names = _renamed(names, {name: name.removeprefix(prefix) for name in names}, prefix, folder)
            wrappers.append(f"{prefix!r} of {wrapper}")
    if not wrappers:
        return source, ()
    return RenamedTensors(source, names), (
        f"{folder}: tensors are read without {' and '.join(wrappers)} in their names",
    )


def _renamed(names: Mapping[str, str], changes: Mapping[str, str], removed: str, folder: Path) -> dict[str, str]:
    result: dict[str, str] = {}
    for name, original in names.items():
        if changes[name] in result:
            raise UserError(
                f"{folder} holds {result[changes[name]]} and {original}, which are one name without {removed!r}; "
                "remove one of them"
            )
        result[changes[name]] = original
    return result
