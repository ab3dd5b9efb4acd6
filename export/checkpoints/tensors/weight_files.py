"""Finds the files that hold a folder's weights: one file, the shards that an index names, or numbered shards alone."""

import re
import reprlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import msgspec

from export.checkpoints.json_files import convert, read_json
from runtime.errors import UserError

NAME_LIMIT = 255  # bytes; file systems refuse longer names of files and folders
DEPTH_LIMIT = 8  # folders
NUMBERED = re.compile(r"-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})")


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


@dataclass(frozen=True)
class WeightFiles:
    """Where weights lie: files by their names within `folder` and, if there is an index, what it lists."""

    folder: Path
    names: tuple[str, ...]
    index: Path | None = None
    listed: Mapping[str, str] = field(default_factory=dict)  # tensor -> file

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files."""
        return tuple(self.folder / name for name in self.names)


def find_weights(folder: Path, stem: str, suffix: str) -> WeightFiles | None:
    """The files of `STEM.SUFFIX`, `STEM.SUFFIX.index.json` or `STEM-00001-of-0000N.SUFFIX`, in this order.

    transformers looks for the first two. None if the folder has none of them. Raises `UserError` for a malformed index,
    for a shard that is missing, and for one outside the folder.
    """
    single, index = f"{stem}{suffix}", folder / f"{stem}{suffix}.index.json"
    if (folder / single).is_file():
        return WeightFiles(folder, (single,))
    if index.is_file():
        return _listed(folder, index, suffix)
    return _numbered(folder, stem, suffix)


def _listed(folder: Path, index: Path, suffix: str) -> WeightFiles:
    weight_map = convert(read_json(index), _Index, index).weight_map
    names = tuple(sorted(set(weight_map.values())))
    for shard in names:
        path = PurePosixPath(shard)
        if path.is_absolute() or ".." in path.parts or path.suffix != suffix or "\0" in shard:
            raise UserError(f"{index} names the shard {shard!r}, expected a {suffix} file inside the folder")
        if not _can_exist(path) or not (folder / shard).is_file():
            raise UserError(
                f"{index} names the shard {reprlib.repr(shard)}, which {folder} does not have; "
                "fetch the checkpoint again"
            )
    return WeightFiles(folder, names, index, weight_map)


def _can_exist(path: PurePosixPath) -> bool:
    """Whether a file system may hold a path; asking it for one that is too long is an error, not an answer."""
    return len(path.parts) <= DEPTH_LIMIT and all(len(part.encode()) <= NAME_LIMIT for part in path.parts)


def _numbered(folder: Path, stem: str, suffix: str) -> WeightFiles | None:
    """The shards of the one complete set: what people have whose index was not fetched."""
    sets: dict[int, set[int]] = defaultdict(set)
    for path in folder.iterdir():
        number = NUMBERED.fullmatch(path.name.removeprefix(stem).removesuffix(suffix))
        if number and path.name.startswith(stem) and path.name.endswith(suffix):
            sets[int(number["count"])].add(int(number["number"]))
    if not sets:
        return None
    names = {count: [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)] for count in sets}
    complete = [count for count in sorted(sets) if sets[count] == set(range(1, count + 1))]
    if not complete:
        count = max(sets)
        missing = next((name for name in names[count] if not (folder / name).is_file()), f"{stem}{suffix}.index.json")
        raise UserError(
            f"{folder} holds {len(sets[count])} shards of {count}, but not {missing}; fetch the checkpoint again"
        )
    if len(complete) > 1:
        raise UserError(
            f"{folder} holds {names[complete[0]][0]} and {names[complete[1]][0]}, each of a complete set of shards, "
            f"and no {stem}{suffix}.index.json to choose between them; remove one of the sets"
        )
    return WeightFiles(folder, tuple(names[complete[0]]))
