"""The first half of the export stage: reads a checkpoint's tensors and stores them in their formats in one file."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import structs

from export.checkpoints.checkpoint import Checkpoint
from export.checkpoints.encodings.encoding import first_row_not_finite
from export.checkpoints.source import TokenizerSource
from export.console import byte_bar
from export.weights.format import Array, ModelTensor
from export.weights.rules import HEAD_WEIGHTS, QuantizedSource, StorageRules
from export.weights.stored import WEIGHTS_FILE, StoredWeights, WeightsRecord
from export.weights.table import STORAGE_DTYPES, carry, specs, store
from runtime.artifact.consistency import CHAT_TEMPLATE_FILE, TOKENIZER_FILES
from runtime.artifact.manifest import Quantization, TokenizerSpec
from runtime.artifact.schemes import SCHEMES
from runtime.artifact.tensor_file import TensorFile, TensorFileWriter, tensor_bytes
from runtime.errors import UserError


def record_of(
    checkpoint: Checkpoint, quantization: Quantization, dtype: str, overrides: Mapping[str, Any]
) -> WeightsRecord:
    """The record of a checkpoint's weights; `dtype` is `backend.dtype`, `overrides` are the changes to its model."""
    model = checkpoint.model
    sources = {
        name: QuantizedSource(packings, checkpoint.encoding(name))
        for name in checkpoint.names()
        if (packings := checkpoint.packings(name))
    }
    rules = StorageRules(quantization, STORAGE_DTYPES[dtype], model.tied_embeddings, model.n_layers, sources)
    tensors = tuple(rules.tensor(name, checkpoint.shape(name)) for name in checkpoint.names())
    if not sources and SCHEMES[quantization.scheme].carries:  # there is nothing that is quantized
        quantization = structs.replace(quantization, scheme="none")
    return WeightsRecord(
        model=model,
        quantization=quantization,
        tensors=tensors,
        tokenizer=_tokenizer_spec(checkpoint.tokenizer) if checkpoint.tokenizer else None,
        overrides={name: tuple(value) if isinstance(value, list) else value for name, value in overrides.items()},
        source_bytes=checkpoint.source_bytes,
    )


def carrying_notes(record: WeightsRecord, checkpoint: Checkpoint) -> tuple[str, ...]:
    """A note, in one sentence, on matrices that were to be carried from a quantized checkpoint and cannot be."""
    if not record.quantization.carries:
        return ()
    rounded = [
        tensor.name
        for tensor in record.tensors
        if not tensor.carried and tensor.name not in HEAD_WEIGHTS and checkpoint.packings(tensor.name)
    ]
    if not rounded:
        return ()
    packings = sorted({packing for name in rounded for packing in checkpoint.packings(name)})
    more = f" and {len(rounded) - 1} more" if len(rounded) > 1 else ""
    return (
        f"{rounded[0]}{more}, stored as {' and '.join(packings)}, "
        "cannot be carried and become int8 with a scale for each row, which moves a number by at most 1/254 of the "
        "largest in its row",
    )


def _tokenizer_spec(source: TokenizerSource) -> TokenizerSpec:
    return TokenizerSpec(
        kind=source.kind,
        file=TOKENIZER_FILES[source.kind],
        bos_id=source.bos_id,
        add_bos=source.add_bos,
        eos_ids=source.eos_ids,
        chat_template=CHAT_TEMPLATE_FILE if source.chat_template is not None else None,
        instruct=source.instruct,
        end_id=source.end_id,
        special_tokens=None if source.special_tokens is None else dict(source.special_tokens),
        model_settings=source.model_settings,
        text_after_added=source.text_after_added,
    )


def store_weights(
    record: WeightsRecord, checkpoint: Checkpoint, folder: Path, rounded: Sequence[TensorFile] = ()
) -> StoredWeights:
    """Fill `folder`, which has the tokenizer already, with the weights of a record and the record itself.

    Tensors that the files in `rounded` hold as they are to be stored are copied from there.
    """
    write_weights(checkpoint, record, folder / WEIGHTS_FILE, rounded)
    stored = StoredWeights(folder, record)
    stored.write_record()
    return stored


def write_weights(
    checkpoint: Checkpoint, record: WeightsRecord, path: Path, rounded: Sequence[TensorFile] = ()
) -> None:
    """Read, quantize and store every tensor, a few rows at a time; see `store_weights`."""
    finished = {name: file for file in rounded for name in file.tensors}
    total = sum(tensor_bytes(spec) for spec in record.weights)
    with TensorFileWriter(path, record.weights) as writer, byte_bar("storing weights", total) as bar:
        for tensor in record.tensors:
            row = 0
            for stored in _stored_blocks(checkpoint, tensor, finished.get(tensor.name)):
                for stored_name, array in stored.items():
                    check_range(array, tensor, row)
                    writer.write(stored_name, array)
                    bar.advance(array.nbytes)
                row += len(stored[tensor.name])


def _stored_blocks(
    checkpoint: Checkpoint, tensor: ModelTensor, finished: TensorFile | None
) -> Iterator[dict[str, Array]]:
    """A tensor's stored arrays, some rows at a time, or all of them from the file that holds them already."""
    if finished is not None:
        return iter([{spec.name: finished.read(spec.name) for spec in specs(tensor)}])
    return _carried_blocks(checkpoint, tensor) if tensor.carried else _rounded_blocks(checkpoint, tensor)


def _rounded_blocks(checkpoint: Checkpoint, tensor: ModelTensor) -> Iterator[dict[str, Array]]:
    for block in checkpoint.blocks(tensor.name):
        with np.errstate(over="ignore"):  # reported by `check_range`, with its place
            stored = store(tensor, block.astype("float32", copy=False))
        yield stored


def _carried_blocks(checkpoint: Checkpoint, tensor: ModelTensor) -> Iterator[dict[str, Array]]:
    encoding = checkpoint.encoding(tensor.name)
    assert encoding is not None
    for i, rows in enumerate(checkpoint.encoded_blocks(tensor.name, encoding)):
        # The order of columns is the same for all rows.
        yield carry(tensor, rows if i == 0 else replace(rows, order=None))


def check_range(stored: Array, tensor: ModelTensor, row: int) -> None:
    """Raise `UserError` if a number was too large for the dtype in which it, or its group's scale, is stored."""
    if stored.dtype.kind in "iu":
        return
    place = first_row_not_finite(stored)
    if place is not None:
        raise UserError(
            f"{tensor.name}, row {row + place}: a number is too large to store as {stored.dtype}; set backend.dtype to "
            "fp32 or bf16, or choose another quantize.scheme"
        )


def write_tokenizer(checkpoint: Checkpoint, record: WeightsRecord, folder: Path) -> None:
    """Write the tokenizer and its chat template."""
    source, spec = checkpoint.tokenizer, record.tokenizer
    if source is None or spec is None:
        return
    (folder / spec.file).write_bytes(source.data)
    if source.chat_template is not None and spec.chat_template is not None:
        (folder / spec.chat_template).write_text(source.chat_template, encoding="utf-8")
