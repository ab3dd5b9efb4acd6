"""Checkpoints: any supported format as one `Checkpoint`, with our tensor names and layout, read one source tensor at a time."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from export import families, gguf_checkpoint, huggingface
from export.source import Array, Opened, TensorSource, TokenizerSource
from runtime.errors import UserError
from runtime.manifest import ModelConfig
from runtime.tensor_file import numpy_dtype

__all__ = ["Checkpoint", "TokenizerSource", "open_checkpoint"]

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration, tokenizer and weights, every stored tensor accounted for; rotary rows are half-split."""

    model: ModelConfig
    tokenizer: TokenizerSource | None
    source_bytes: int  # of all tensors, as stored
    weights: Mapping[str, families.Weight]
    source: TensorSource

    def names(self) -> tuple[str, ...]:
        """Our tensor names."""
        return tuple(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of our tensors."""
        return self.weights[name].shape

    def dtype(self, name: str) -> str:
        """The dtype that `tensor` gives: as stored, or float32 where the parts of a fused tensor differ."""
        stored = {self.source.tensors[part.source].dtype for part in self.weights[name].parts}
        return stored.pop() if len(stored) == 1 else "float32"

    def tensor(self, name: str) -> Array:
        """One of our tensors, row-major; holds it and one source tensor in memory."""
        weight = self.weights[name]
        if len(weight.parts) == 1:
            return self._part(weight.parts[0])
        result = np.empty(weight.shape, numpy_dtype(self.dtype(name)))
        row = 0
        for part in weight.parts:
            result[row : row + part.shape[0]] = self._part(part)
            row += part.shape[0]
        return result

    def _part(self, part: families.Part) -> Array:
        rows = self.source.read(part.source)
        return rows if part.interleaved_heads is None else half_split_rows(rows, part.interleaved_heads)


def open_checkpoint(path: Path, kind: str, overrides: Mapping[str, object]) -> Checkpoint:
    """Open a checkpoint of a `kind` of `KINDS` or "auto"; `overrides` replace fields of the model, such as sliding_window for all layers.

    Every tensor is accounted for by name, shape and dtype before any data is read; raises `UserError` for what is missing or does not fit.
    """
    checkpoint_files(path)
    found = detect(path) if kind == "auto" else kind
    if found not in KINDS:
        raise UserError(f"frontend.type is {kind!r}, expected one of {', '.join(('auto', *KINDS))}")
    opened = KINDS[found](path)
    model = _tied_as_stored(families.model_config(opened.family, opened.values, overrides, opened.where), opened)
    weights = families.weights(opened.family, model)
    check_tensors(opened, weights, families.ignored(opened.family, model), path)
    source_bytes = sum(tensor.nbytes for tensor in opened.source.tensors.values())
    return Checkpoint(model, opened.tokenizer, source_bytes, weights, opened.source)


def checkpoint_files(path: Path) -> list[Path]:
    """The file, or all files of the folder, that a checkpoint may be read from; raises `UserError` when there is nothing."""
    if not path.exists():
        raise UserError(f"the checkpoint {path} does not exist; set frontend.checkpoint to a folder or file that does")
    return sorted(entry for entry in path.iterdir() if entry.is_file()) if path.is_dir() else [path]


def detect(path: Path) -> str:
    """The kind of checkpoint that a path holds, told by what is in it."""
    if path.is_file():
        return "gguf"
    if (path / "config.json").is_file():
        return "huggingface"
    if (path / "params.json").is_file():
        return "mistral"
    if any(path.glob("*.gguf")):
        return "gguf"
    raise UserError(f"{path} holds no checkpoint that is known, expected config.json with model.safetensors, or a .gguf file")


def check_tensors(opened: Opened, weights: Mapping[str, families.Weight], ignored: set[str], path: Path) -> None:
    """Every part is stored with its shape and a dtype that we read, and nothing is stored that no weight takes."""
    stored = opened.source.tensors
    parts = {part.source: part for weight in weights.values() for part in weight.parts}
    missing = [name for name in parts if name not in stored]
    if missing:
        raise UserError(f"{path} lacks the tensor {missing[0]}{_more(missing)}, which {opened.where} calls for; fetch the checkpoint again")
    extra = sorted(set(stored) - set(parts) - ignored)
    if extra:
        raise UserError(f"{path} holds the tensor {extra[0]}{_more(extra)}, which a {opened.family.family} of {opened.where} has no place for")
    for name, part in parts.items():
        if stored[name].shape != part.shape:
            raise UserError(f"{path}: {name} has shape {stored[name].shape}, expected {part.shape} by {opened.where}")
        if stored[name].dtype not in DTYPES:
            raise UserError(f"{path}: {name} has dtype {stored[name].dtype}, expected one of {', '.join(DTYPES)}")


def _tied_as_stored(model: ModelConfig, opened: Opened) -> ModelConfig:
    """A head that is stored counts, whatever the flag says: as in transformers, where one that differs is not tied."""
    stored = opened.family.sources[families.HEAD][0] in opened.source.tensors
    return msgspec.structs.replace(model, tied_embeddings=model.tied_embeddings and not stored)


def half_split_rows(rows: Array, heads: int) -> Array:
    """Reorder the rows (heads * head_dim, columns) from rotary neighbours to halves: row 2d + h of a head goes to h * head_dim / 2 + d.

    Worked example, head_dim 6: rows 0 1 2 3 4 5 (pairs 0 1, 2 3, 4 5) become 0 2 4 1 3 5, so that d pairs with d + 3.
    """
    split = rows.reshape(heads, -1, 2, rows.shape[-1])  # (heads, head_dim / 2, 2, columns)
    return split.swapaxes(1, 2).reshape(rows.shape)


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _mistral_format(path: Path) -> Opened:
    """Mistral's own raw format, whose reader has its place here."""
    converter = "convert_mistral_weights_to_hf.py in the repository of transformers"
    raise UserError(
        f"{path} is in Mistral's own format (params.json), which is not read yet; convert it to the Hugging Face form first ({converter})"
    )


KINDS: Mapping[str, Callable[[Path], Opened]] = {
    "huggingface": huggingface.open_folder,
    "mistral": _mistral_format,
    "gguf": gguf_checkpoint.open_file,
}
