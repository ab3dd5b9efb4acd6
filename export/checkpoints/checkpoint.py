"""Opens any supported format as one `Checkpoint`: our tensor names and row order, read one source tensor at a time."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import msgspec
import numpy as np

from export.checkpoints import heads
from export.checkpoints.adapters.adapter import with_adapter
from export.checkpoints.encodings.encoding import EncodedRows, Encoding, first_row_not_finite
from export.checkpoints.encodings.join import converted, joined
from export.checkpoints.families import MODEL_NAMES
from export.checkpoints.gguf import checkpoint as gguf_checkpoint
from export.checkpoints.huggingface import folder as huggingface
from export.checkpoints.hyperparameters import model_config
from export.checkpoints.location import check_fetched, checkpoint_files, detect
from export.checkpoints.mistral import folder as mistral_format
from export.checkpoints.source import Array, Opened, TensorSource, TokenizerSource
from export.checkpoints.tensor_layout import EMBEDDINGS, HEAD_WEIGHT, AssembledTensor, Part, ignored, weights
from export.checkpoints.tokenizers.chat import AS_PUBLISHED, Chat, check_no_instruct, template_notes, with_template
from runtime.artifact.manifest import ModelConfig
from runtime.artifact.tensor_file import numpy_dtype
from runtime.errors import UserError

__all__ = ["Checkpoint", "TokenizerSource", "open_checkpoint"]

BLOCK_ELEMENTS = 2**24  # elements read at a time: 64 MB as float32
WIDER = "float64"  # read as float32, the widest that is stored
DTYPES = ("float32", "float16", "bfloat16", WIDER)
UNMERGED = re.compile(r"\.(lora_[A-Za-z_]+|base_layer)(\.|$)")  # in the names of tensors of an adapter and its base


@dataclass(frozen=True)
class Checkpoint:
    """A model's configuration, tokenizer and weights, every stored tensor accounted for; rotary rows are half-split."""

    model: ModelConfig
    tokenizer: TokenizerSource | None
    source_bytes: int  # total size of all tensors, as stored
    weights: Mapping[str, AssembledTensor]
    source: TensorSource
    notes: tuple[str, ...] = ()  # for the user, on how the checkpoint was read

    def names(self) -> tuple[str, ...]:
        """Our tensor names."""
        return tuple(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of our tensors."""
        return self.weights[name].shape

    def dtype(self, name: str) -> str:
        """The dtype that `tensor` returns: as stored, or float32 if that is wider or the parts of a tensor differ."""
        stored = {self.source.tensors[part.source].dtype for part in self.weights[name].parts}
        return stored.pop() if len(stored) == 1 and not stored & {WIDER} else "float32"

    def encoding(self, name: str) -> Encoding | None:
        """The encoding in which one of our tensors can be carried as it is stored, every value exactly.

        None for plain numbers, and if the parts of a tensor have no encoding in common.
        """
        parts = [self.source.tensors[part.source].encoded for part in self.weights[name].parts]
        if any(part is None for part in parts):
            return None
        return joined([part.encoding for part in parts if part is not None])

    def packings(self, name: str) -> tuple[str, ...]:
        """The formats of the quantized numbers of one of our tensors; empty if any part is of plain numbers."""
        found = {self.source.tensors[part.source].packing: None for part in self.weights[name].parts}
        return () if None in found else tuple(packing for packing in found if packing is not None)

    def tensor(self, name: str) -> Array:
        """One of our tensors, whole and row-major."""
        result = np.empty(self.shape(name), numpy_dtype(self.dtype(name)))
        row = 0
        for block in self.blocks(name):
            result[row : row + len(block)] = block
            row += len(block)
        return result

    def blocks(self, name: str) -> Iterator[Array]:
        """The rows of one of our tensors in order, a bounded number of bytes at a time.

        Raises `UserError` for a number that is NaN or infinite.
        """
        for part, rows in self._pieces(name):
            block = self.source.read(part.source, rows)
            bad = first_row_not_finite(block)
            if bad is not None:
                found = f"the tensor {part.source} holds a NaN or an infinite number in row {rows.start + bad}"
                raise UserError(f"{found}, expected finite numbers; fetch the checkpoint again")
            if block.dtype == WIDER:
                block = block.astype(np.float32)
            yield block if part.interleaved_heads is None else half_split_rows(block, part.interleaved_heads)

    def encoded_blocks(self, name: str, encoding: Encoding) -> Iterator[EncodedRows]:
        """The rows of one of our tensors as the checkpoint stores them; `encoding` is that of `encoding(name)`."""
        for part, rows in self._pieces(name):
            matrix = self.source.tensors[part.source].encoded
            assert matrix is not None
            block = converted(matrix.read(rows), matrix.encoding, encoding)
            if part.interleaved_heads is not None:
                index = np.arange(rows.stop - rows.start)[:, None]
                block = block.select(half_split_rows(index, part.interleaved_heads)[:, 0])
            yield block

    def _pieces(self, name: str) -> Iterator[tuple[Part, slice]]:
        """The parts of one of our tensors, some rows of each at a time; all rows of one whose rows are reordered."""
        for part in self.weights[name].parts:
            rows = part.shape[0] if part.interleaved_heads else max(BLOCK_ELEMENTS // prod(part.shape[1:]), 1)
            end = part.first_row + part.shape[0]
            for start in range(part.first_row, end, rows):
                yield part, slice(start, min(start + rows, end))


def open_checkpoint(
    path: Path,
    kind: str,
    overrides: Mapping[str, object],
    *,
    chat: Chat = AS_PUBLISHED,
    head: str = "auto",
    adapter: Path | None = None,
) -> Checkpoint:
    """Open a checkpoint whose `kind` is one of `KINDS` or "auto".

    `overrides` replace fields of the model, such as sliding_window for all layers.
    `chat` is what the user says of the model's conversations.
    `head` is one of `runtime.artifact.manifest.HEADS`, or "auto" for the one that the checkpoint's files name.
    `adapter` is the folder of an adapter that is merged into the weights as they are read.
    Every tensor is accounted for by name, shape and dtype before any data is read. Raises `UserError` for anything that
    is missing or does not fit.
    """
    found = detect(path) if kind == "auto" else kind
    if found not in KINDS:
        raise UserError(f"frontend.type is {kind!r}, expected one of {', '.join(('auto', *KINDS))}")
    checkpoint_files(path, found)
    check_fetched(path, found)
    opened = with_template(KINDS[found](path, chat), chat.template, path)
    if adapter is not None:
        opened = with_adapter(opened, found, adapter)
    opened, head_fields = heads.attach(opened, head)
    plain = model_config(opened.family, opened.values, overrides, opened.where, opened.rotary)
    described = msgspec.structs.replace(plain, **head_fields)
    opened = _with_shared_embeddings(opened, described)
    model = _tied_as_stored(described, opened)
    layout = weights(opened.family, model)
    check_tensors(opened, layout, ignored(opened.family, model), path)
    source_bytes = sum(tensor.nbytes for tensor in opened.source.tensors.values())
    notes = (*opened.notes, *template_notes(opened.tokenizer, path))
    return Checkpoint(model, opened.tokenizer, source_bytes, layout, opened.source, notes)


def check_tensors(opened: Opened, layout: Mapping[str, AssembledTensor], unused: set[str], path: Path) -> None:
    """Check that every part is stored with its shape and a readable dtype, and that no stored tensor is left over."""
    stored = opened.source.tensors
    unmerged = [name for name in stored if UNMERGED.search(name)]
    if unmerged:
        raise UserError(
            f"{path} holds the tensor {unmerged[0]}{_more(unmerged)}, part of an adapter that is not merged; merge it "
            "into its base, or set frontend.checkpoint to the base and frontend.adapter to the adapter"
        )
    parts = {part.source: part for weight in layout.values() for part in weight.parts}
    missing = [name for name in parts if name not in stored]
    if missing:
        raise UserError(
            f"{path} lacks the tensor {missing[0]}{_more(missing)}, which {opened.where} calls for; "
            f"{_advice_on_missing(missing, opened)}"
        )
    extra = sorted(set(stored) - set(parts) - unused)
    if extra:
        raise UserError(
            f"{path} holds the tensor {extra[0]}{_more(extra)}, "
            f"which has no place in a {MODEL_NAMES[opened.family.layers]} model as {opened.where} describes it"
        )
    for name, part in parts.items():
        if stored[name].shape != part.source_shape:
            raise UserError(
                f"{path}: {name} has shape {stored[name].shape}, expected {part.source_shape} by {opened.where}; "
                f"{_advice_on_shape(name, stored[name].shape, part.source_shape, opened)}"
            )
        if stored[name].dtype not in DTYPES:
            raise UserError(f"{path}: {name} has dtype {stored[name].dtype}, expected one of {', '.join(DTYPES)}")


def _with_shared_embeddings(opened: Opened, model: ModelConfig) -> Opened:
    """The checkpoint, whose embeddings are the head's matrix if they are tied and only the head is stored.

    safetensors keeps one name of a matrix that has two, and that may be the head's.
    """
    if not (model.tied_embeddings and model.generates):
        return opened
    sources, stored = opened.family.sources, opened.source.tensors
    embeddings, head = sources[EMBEDDINGS], sources[HEAD_WEIGHT]
    if embeddings[0] in stored or head[0] not in stored:
        return opened
    shared = {**sources, EMBEDDINGS: head, HEAD_WEIGHT: embeddings}
    return replace(opened, family=replace(opened.family, sources=shared))


def _tied_as_stored(model: ModelConfig, opened: Opened) -> ModelConfig:
    """The model, with tied embeddings only if it generates and no head is stored.

    A stored head counts, whatever the flag says: in transformers, too, a head that differs is not tied.
    """
    can_be = model.generates and opened.family.sources[HEAD_WEIGHT][0] not in opened.source.tensors
    return msgspec.structs.replace(model, tied_embeddings=model.tied_embeddings and can_be)


def half_split_rows(rows: Array, heads: int) -> Array:
    """Reorder the rows (heads * head_dim, columns) from interleaved rotary pairs to half-split ones.

    Row 2d + h of a head moves to h * head_dim / 2 + d.
    Worked example, head_dim 6: rows 0 1 2 3 4 5 (pairs 0 1, 2 3, 4 5) become 0 2 4 1 3 5, so that d pairs with d + 3.
    """
    split = rows.reshape(heads, -1, 2, rows.shape[-1])  # (heads, head_dim / 2, 2, columns)
    return split.swapaxes(1, 2).reshape(rows.shape)


def _advice_on_missing(missing: list[str], opened: Opened) -> str:
    again = "fetch the checkpoint again"
    if tuple(missing) != opened.family.sources.get(HEAD_WEIGHT):
        return again
    return f"{again}, or set {opened.family.keys['tied_embeddings']} to true there if the embeddings are the head too"


def _advice_on_shape(name: str, found: tuple[int, ...], expected: tuple[int, ...], opened: Opened) -> str:
    sources, key = opened.family.sources, opened.family.keys["vocab_size"]
    has_vocabulary = (name,) in (sources[EMBEDDINGS], sources.get(HEAD_WEIGHT))
    if has_vocabulary and found[1:] == expected[1:]:
        return f"if tokens were added to the model, set {key} to {found[0]} there, else fetch the checkpoint again"
    return "fetch the files of one model"


def _more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def _open_gguf(path: Path, chat: Chat) -> Opened:
    check_no_instruct(chat, path, "gguf")
    return gguf_checkpoint.open_file(path)


KINDS: Mapping[str, Callable[[Path, Chat], Opened]] = {
    "huggingface": huggingface.open_folder,
    "mistral": mistral_format.open_folder,
    "gguf": _open_gguf,
}
