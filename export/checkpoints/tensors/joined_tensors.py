"""The tensors of several files as one source: each in one file, or in the file that an index names for it."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from export.checkpoints.source import Array, SourceTensor, TensorSource
from export.checkpoints.tensors.pth_file import PthTensors
from export.checkpoints.tensors.safetensors_source import SafetensorsSource
from export.checkpoints.tensors.weight_files import WeightFiles
from runtime.artifact.tensor_file import TensorFile
from runtime.errors import UserError


@dataclass(frozen=True)
class JoinedTensors:
    """Tensors of several sources, by the source of each."""

    sources: Mapping[str, TensorSource]

    @cached_property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name."""
        return {name: source.tensors[name] for name, source in self.sources.items()}

    def read(self, name: str, rows: slice) -> Array:
        """Rows of one tensor, as stored."""
        return self.sources[name].read(name, rows)


def open_weights(files: WeightFiles) -> tuple[TensorSource, tuple[str, ...]]:
    """The tensors of a checkpoint's files, and notes on what was chosen.

    Where an index lists a tensor, its file is read, whatever other files hold. Raises `UserError` for a tensor that is
    not where the index says, or that lies in several files and that no index lists.
    """
    opened = {name: open_tensor_file(path) for name, path in zip(files.names, files.paths, strict=True)}
    for name, file in files.listed.items():
        if name not in opened[file].tensors:
            raise UserError(
                f"{files.folder / file} lacks the tensor {name}, which {files.index} lists there; "
                "fetch the checkpoint again"
            )
    holders: dict[str, list[str]] = defaultdict(list)
    for file, source in opened.items():
        for name in source.tensors:
            holders[name].append(file)
    for name, held in holders.items():
        if len(held) > 1 and name not in files.listed:
            raise UserError(
                f"{files.folder / held[1]} holds the tensor {name}, which {held[0]} holds too, "
                "expected whole tensors, each in one file; fetch the checkpoint again"
            )
    chosen = {name: files.listed.get(name, held[0]) for name, held in holders.items()}
    return JoinedTensors({name: opened[file] for name, file in chosen.items()}), _notes(files, holders)


def open_tensor_file(path: Path) -> TensorSource:
    """The tensors of one file, safetensors or pickled by torch."""
    if path.suffix == ".safetensors":
        return SafetensorsSource(TensorFile.open(path))
    return PthTensors.open([path])


def _notes(files: WeightFiles, holders: Mapping[str, list[str]]) -> tuple[str, ...]:
    if files.index is None:
        return ()
    repeated = [name for name, held in holders.items() if len(held) > 1]
    unlisted = [name for name in holders if name not in files.listed]
    notes = []
    if repeated:
        name = repeated[0]
        notes.append(
            f"{_counted(repeated)} in more than one shard of {files.folder}, {name} in {' and '.join(holders[name])}; "
            f"{files.index.name} says which to read, for {name} {files.listed[name]}"
        )
    if unlisted:
        notes.append(
            f"{files.index} does not list {unlisted[0]}, which {holders[unlisted[0]][0]} holds"
            f"{f', nor {len(unlisted) - 1} more' if len(unlisted) > 1 else ''}; read all the same, as transformers does"
        )
    return tuple(notes)


def _counted(names: list[str]) -> str:
    return "1 tensor lies" if len(names) == 1 else f"{len(names)} tensors lie"
