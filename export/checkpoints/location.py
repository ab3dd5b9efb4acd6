"""Where a checkpoint lies on disk: the kind that a path holds, the files that count, and which of them are missing."""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from export.checkpoints.advice import advice_on_file, advice_on_folder
from export.checkpoints.gguf import split as gguf_split
from export.checkpoints.huggingface.sentence_embedding import pooling_files
from export.checkpoints.huggingface.tensors import FORMS, find_huggingface_weights
from export.checkpoints.links import check_link, check_regular, is_lfs_pointer, lfs_advice
from export.checkpoints.mistral.weights import find_raw_weights
from export.checkpoints.tensors.weight_files import WeightFiles
from export.checkpoints.tokenizers.chat_templates import more_template_files
from runtime.errors import UserError

# How the names of the small files that readers open begin.
SMALL_FILES = ("config.json", "params.json", "generation_config", "tokenizer", "tekken", "special_tokens_map",
               "added_tokens", "chat_template", "processor_config", "model.safetensors.index",
               "pytorch_model.bin.index", "quant_config", "quantize_config")  # fmt: skip
HUB_NAME = re.compile(r"(https?:/+([\w.-]+)/)?[\w.-]+/[\w.-]+")  # such as mistralai/Mistral-7B-v0.1
WEIGHTS: Mapping[str, Callable[[Path], WeightFiles | None]] = {  # by kind of checkpoint
    "huggingface": lambda folder: find_huggingface_weights(folder) or find_raw_weights(folder),
    "mistral": find_raw_weights,
    "gguf": lambda folder: WeightFiles(folder, tuple(path.name for path in folder.glob("*.gguf"))),
}


def checkpoint_files(path: Path, kind: str = "auto") -> list[Path]:
    """The file and the other parts of a split one, or every file of the folder and those below it that count.

    Raises `UserError` if there is none, for a link that leads out of the folder or nowhere, and for whatever is neither
    a file nor a folder.
    """
    check_exists(path)
    if path.is_dir():
        for entry in path.iterdir():
            check_regular(entry)
        inside = {entry for entry in path.iterdir() if entry.is_file()}
        shards = _shards(path, detect(path) if kind == "auto" else kind)
        below = (*shards, *more_template_files(path), *pooling_files(path))
        files = sorted(inside.union(below))
        for file in files:
            check_link(file, path)
        return files
    if not path.is_file():
        raise UserError(f"the checkpoint {path} is neither a folder nor a regular file; set frontend.checkpoint to one")
    return gguf_split.parts(path)


def check_exists(path: Path) -> None:
    """Raise `UserError` if there is nothing at a path."""
    if path.exists():
        return
    if HUB_NAME.fullmatch(str(path)) and not path.parent.exists():
        raise UserError(
            f"the checkpoint {path} does not exist; if it is a model on the Hugging Face Hub, fetch it first, for "
            "example with `hf download`, and set frontend.checkpoint to its folder"
        )
    raise UserError(f"the checkpoint {path} does not exist; set frontend.checkpoint to a folder or file that does")


def detect(path: Path) -> str:
    """The kind of checkpoint that a path holds, recognized by its files.

    Raises `UserError` that says what the path holds instead, and what to name in its place.
    """
    check_exists(path)
    if not path.is_dir():
        advice = advice_on_file(path)
        if advice:
            raise UserError(advice)
        return "gguf"
    names = {entry.name for entry in path.iterdir() if entry.is_file()}
    if "config.json" in names:
        return _kind_beside_config(names)
    if "params.json" in names:
        return "mistral"
    if any(name.endswith(".gguf") for name in names):
        return "gguf"
    known = "config.json with model.safetensors, params.json with consolidated.safetensors, or a .gguf file"
    raise UserError(advice_on_folder(path) or f"{path} holds no checkpoint of a known format, expected {known}")


def _kind_beside_config(names: set[str]) -> str:
    """The kind of a folder with config.json, which is published beside weights of other kinds too."""
    theirs = [
        name for name in names if name.startswith(tuple(stem for stem, _ in FORMS)) and not name.endswith(".gguf")
    ]
    if not theirs and "params.json" in names and any(name.startswith("consolidated") for name in names):
        return "mistral"
    weights = [name for name in names if name.endswith((".safetensors", ".bin", ".pt", ".pth"))]
    return "gguf" if not theirs and not weights and any(name.endswith(".gguf") for name in names) else "huggingface"


def check_fetched(path: Path, kind: str) -> None:
    """Raise `UserError` for a file of a checkpoint that Git LFS has not fetched."""
    for file in _read_files(path, kind) if path.is_dir() else gguf_split.parts(path):
        if is_lfs_pointer(file):
            raise UserError(lfs_advice(file))


def _read_files(folder: Path, kind: str) -> Iterator[Path]:
    """The files that a reader opens; the index, if there is one, before the shards, whose names it gives."""
    yield from (file for file in sorted(folder.iterdir()) if file.is_file() and file.name.startswith(SMALL_FILES))
    yield from _shards(folder, kind)


def _shards(folder: Path, kind: str) -> tuple[Path, ...]:
    found = WEIGHTS[kind](folder)
    return found.paths if found else ()
