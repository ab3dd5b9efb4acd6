"""Finds the tensors of a Hugging Face folder: in one safetensors file, or in the shards that an index names."""

from pathlib import Path, PurePosixPath

import msgspec

from export.checkpoints.json_files import convert, read_json
from export.checkpoints.safetensors_source import SafetensorsSource
from runtime.artifact.tensor_file import TensorFile
from runtime.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PATH_LIMIT = 1024  # characters; longer names are refused by file systems


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


def open_tensors(folder: Path) -> SafetensorsSource:
    """Open model.safetensors, or else the shards that the index names: transformers looks for them in this order."""
    if (folder / SINGLE).is_file():
        file = TensorFile.open(folder / SINGLE)
        return SafetensorsSource.of(file)
    if (folder / INDEX).is_file():
        return _open_shards(folder)
    raise UserError(
        f"{folder} has neither {SINGLE} nor {INDEX}; save the checkpoint as safetensors, since no other format is read"
    )


def shards(folder: Path) -> dict[str, str]:
    """The shards that the folder's index names, by tensor; none if the folder has no index, or one file for all.

    Raises `UserError` for a malformed index, and for a shard that is outside the folder or missing.
    """
    index = folder / INDEX
    if (folder / SINGLE).is_file() or not index.is_file():
        return {}
    weight_map = convert(read_json(index), _Index, index).weight_map
    for shard in set(weight_map.values()):
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or path.suffix != ".safetensors" or "\0" in shard:
            raise UserError(f"{index} names the shard {shard!r}, expected a .safetensors file inside the folder")
        if len(shard) > PATH_LIMIT or not (folder / shard).is_file():
            raise UserError(
                f"{index} names the shard {shard!r}, which {folder} does not have; fetch the checkpoint again"
            )
    return weight_map


def _open_shards(folder: Path) -> SafetensorsSource:
    index, weight_map = folder / INDEX, shards(folder)
    opened = {shard: TensorFile.open(folder / shard) for shard in sorted(set(weight_map.values()))}
    for name, shard in weight_map.items():
        if name not in opened[shard].tensors:
            raise UserError(
                f"{folder / shard} lacks the tensor {name}, which {index} lists there; fetch the checkpoint again"
            )
    for shard, file in opened.items():
        for name in file.tensors:
            if weight_map.get(name) != shard:
                raise UserError(
                    f"{file.path} holds the tensor {name}, which {index} does not list there; "
                    "fetch the checkpoint again"
                )
    return SafetensorsSource({name: opened[shard] for name, shard in weight_map.items()})
