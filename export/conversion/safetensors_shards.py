"""Writes safetensors as other software expects them: one file, or shards with an index, a block of rows at a time.

Unlike the artifact's file (`runtime/artifact/tensor_file.py`), these hold only the model's tensors: no padding, which
loaders would take for tensors.
"""

import json
import struct
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np

from export.conversion.target_formats import FormTensors
from runtime.artifact.tensor_file import CODES, METADATA, numpy_dtype

HEADER_ALIGNMENT = 8  # bytes, as the `safetensors` package writes it
MADE_FOR = {"format": "pt"}  # transformers refuses a file without it


def total_bytes(tensors: FormTensors) -> int:
    """Total size of all tensors in bytes."""
    return sum(_nbytes(tensors, name) for name in tensors.names())


def write_shards(
    folder: Path, stem: str, tensors: FormTensors, shard_bytes: int, advance: Callable[[int], None]
) -> None:
    """Write STEM.safetensors, or beyond `shard_bytes`, STEM-00001-of-0000N.safetensors and STEM.safetensors.index.json.

    `advance` is called with the number of bytes after each block.
    """
    shards = list(_shards(tensors, shard_bytes))
    if len(shards) == 1:
        write_file(folder / f"{stem}.safetensors", tensors, shards[0], advance)
        return
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for file, names in zip(files, shards, strict=True):
        write_file(folder / file, tensors, names, advance)
    weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
    index = {"metadata": {"total_size": total_bytes(tensors)}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_file(path: Path, tensors: FormTensors, names: Sequence[str], advance: Callable[[int], None]) -> None:
    """Write one file with the tensors `names`.

    Wider dtypes come first, so that each tensor begins at a multiple of its element size.
    """
    ordered = sorted(names, key=lambda name: -numpy_dtype(tensors.dtype(name)).itemsize)
    with path.open("wb") as file:
        file.write(_header(tensors, ordered))
        for name in ordered:
            for block in tensors.blocks(name):
                assert str(block.dtype) == tensors.dtype(name), (
                    f"{name} gave {block.dtype}, expected {tensors.dtype(name)}"
                )
                file.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
                advance(block.nbytes)


def _header(tensors: FormTensors, names: Sequence[str]) -> bytes:
    entries: dict[str, object] = {METADATA: MADE_FOR}
    position = 0
    for name in names:
        end = position + _nbytes(tensors, name)
        entries[name] = {
            "dtype": CODES[tensors.dtype(name)],
            "shape": list(tensors.shape(name)),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _shards(tensors: FormTensors, shard_bytes: int) -> Iterator[list[str]]:
    """Names in order, cut where the next tensor would no longer fit; a tensor that is too large gets its own shard."""
    shard: list[str] = []
    used = 0
    for name in tensors.names():
        nbytes = _nbytes(tensors, name)
        if shard and used + nbytes > shard_bytes:
            yield shard
            shard, used = [], 0
        shard.append(name)
        used += nbytes
    yield shard


def _nbytes(tensors: FormTensors, name: str) -> int:
    return prod(tensors.shape(name)) * numpy_dtype(tensors.dtype(name)).itemsize
