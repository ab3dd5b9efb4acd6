"""Finds and opens the tensors of a Hugging Face folder, in every form in which its weights are published."""

from pathlib import Path

from export.checkpoints.advice import ADAPTER_CONFIG, OWN_ADAPTER, advice_on_folder
from export.checkpoints.mistral.weights import find_raw_weights, open_raw_weights
from export.checkpoints.source import TensorSource
from export.checkpoints.tensors.joined_tensors import open_weights
from export.checkpoints.tensors.plain_names import with_plain_names
from export.checkpoints.tensors.weight_files import WeightFiles, find_weights
from runtime.errors import UserError

FORMS = (("model", ".safetensors"), ("pytorch_model", ".bin"))  # transformers prefers safetensors
ADAPTER_FILES = ("adapter_model.safetensors", OWN_ADAPTER)


def open_tensors(folder: Path) -> tuple[TensorSource, tuple[str, ...]]:
    """The folder's tensors, and notes on where they were found and how they were named.

    Raises `UserError` if there are none, and for whatever is missing or malformed.
    """
    found = find_huggingface_weights(folder)
    if found is not None:
        source, notes = open_weights(found)
        plain, renamed = with_plain_names(source, folder)
        return plain, (*_notes(found), *notes, *renamed)
    if find_raw_weights(folder):
        return open_raw_weights(folder)
    advice = advice_on_folder(folder)
    if advice:
        raise UserError(advice)
    expected = "model.safetensors, model.safetensors.index.json, pytorch_model.bin nor pytorch_model.bin.index.json"
    raise UserError(f"{folder} has neither {expected}; fetch the checkpoint's weights into it")


def find_huggingface_weights(folder: Path) -> WeightFiles | None:
    """The files with the weights of a Hugging Face folder, or None.

    Raises `UserError` for an index that does not fit the folder, and for shards that are not complete.
    """
    for stem, suffix in FORMS:
        found = find_weights(folder, stem, suffix)
        if found is not None:
            return found
    others = sorted(
        path.name
        for path in folder.glob("*.safetensors")
        if path.name not in ADAPTER_FILES and not path.name.startswith("consolidated")
    )
    if len(others) > 1:
        raise UserError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json, but {len(others)} other files "
            f"such as {others[0]} and {others[1]}; leave the one that holds the model, or fetch the index"
        )
    return WeightFiles(folder, tuple(others)) if others else None


def is_read_by_transformers(folder: Path) -> bool:
    """Whether transformers finds a folder's weights, and knows their names."""
    found = find_huggingface_weights(folder)
    if found is None or _notes(found):
        return False
    source, notes = open_weights(found)
    return not notes and with_plain_names(source, folder)[0] is source


def _notes(found: WeightFiles) -> tuple[str, ...]:
    return (*_form_notes(found), *_adapter_notes(found.folder))


def _adapter_notes(folder: Path) -> tuple[str, ...]:
    if not (folder / ADAPTER_CONFIG).is_file():
        return ()
    return (f"{folder} holds an adapter beside the model, which is merged only if frontend.adapter names it",)


def _form_notes(found: WeightFiles) -> tuple[str, ...]:
    if found.index is not None or found.names[0] in {stem + suffix for stem, suffix in FORMS}:
        return ()
    if len(found.names) == 1 and not found.names[0].startswith(tuple(stem for stem, _ in FORMS)):
        return (f"{found.paths[0]} is read as the model, since {found.folder} has no model.safetensors",)
    return (f"{found.folder} has no index; its numbered shards are all read, {len(found.names)} of them",)
