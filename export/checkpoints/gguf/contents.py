"""What a GGUF holds when it is no language model: files that are published beside models, in the same folder."""

from collections.abc import Mapping
from pathlib import Path

from export.checkpoints.gguf.header import general_strings
from runtime.errors import UserError

TYPE, ARCHITECTURE = "general.type", "general.architecture"
# By `general.type`, or the architecture in files that are older than that key: what the file holds, and what to do.
COMPANIONS: Mapping[str, tuple[str, str]] = {
    "mmproj": ("an image encoder", "set frontend.checkpoint to the file of the language model"),
    "clip": ("an image encoder", "set frontend.checkpoint to the file of the language model"),
    "imatrix": ("statistics for quantizing a model", "set frontend.checkpoint to the file of the model"),
    "adapter": (
        "an adapter, which changes the weights of another model",
        "set frontend.checkpoint to that model as a Hugging Face folder, and frontend.adapter to the adapter as peft "
        "saves it",
    ),
}


def is_companion(path: Path) -> bool:
    """Whether a file holds something other than a language model; False for what is no GGUF at all."""
    return _companion(general_strings(path)) is not None


def check_is_model(path: Path, metadata: Mapping[str, object]) -> None:
    """Raise `UserError` for a file that holds something other than a language model, by its header."""
    found = _companion(metadata)
    if found is not None:
        held, advice = COMPANIONS[found]
        raise UserError(f"{path} holds {held}, expected a language model; {advice}")


def _companion(metadata: Mapping[str, object]) -> str | None:
    said = (metadata.get(TYPE), metadata.get(ARCHITECTURE))
    return next((value for value in said if isinstance(value, str) and value in COMPANIONS), None)
