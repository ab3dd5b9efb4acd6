"""How the files of sentence-transformers say that a text's hidden states become one vector."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec

from export.checkpoints.json_files import convert, read_json, read_value
from runtime.artifact.manifest import Pool
from runtime.errors import UserError

MODULES_FILE, POOLING_FILES = "modules.json", "*_Pooling/config.json"
DECODER, POOLING, NORMALIZE = "Transformer", "Pooling", "Normalize"  # classes of modules
MODE = "pooling_mode"  # a name or, in files of older releases, the prefix of a flag for each
POOLS: Mapping[str, Pool] = {"lasttoken": "last", "last": "last", "mean": "mean", "mean_tokens": "mean"}
REMOVE = f"remove {MODULES_FILE} to get vectors of the decoder alone"


@dataclass(frozen=True)
class Pooling:
    """What `runtime.embed` does with hidden states unless it is told otherwise."""

    pool: Pool = "last"
    normalize: bool = False


class _Module(msgspec.Struct, frozen=True):
    type: str

    @property
    def name(self) -> str:
        return self.type.rpartition(".")[2]


def read_pooling(folder: Path) -> Pooling:
    """The pooling of a folder, as far as its files say one.

    Raises `UserError` if they are malformed, or ask for what `runtime.embed` cannot do.
    """
    path = folder / MODULES_FILE
    if not path.is_file():
        return Pooling()
    modules = convert(read_value(path), tuple[_Module, ...], path)
    other = next((module.name for module in modules if module.name not in (DECODER, POOLING, NORMALIZE)), None)
    if other is not None:
        raise UserError(
            f"{path} has the module {other}, which is not supported, expected {DECODER}, {POOLING} "
            f"and {NORMALIZE}; {REMOVE}"
        )
    pools = [_pool(file) for file in pooling_files(folder)]
    return Pooling(pools[0] if pools else "last", any(module.name == NORMALIZE for module in modules))


def pooling_files(folder: Path) -> list[Path]:
    """The files that describe the pooling, each in the folder of its module."""
    return sorted(path for path in folder.glob(POOLING_FILES) if path.is_file())


def _pool(path: Path) -> Pool:
    modes = list(_modes(read_json(path)))
    if len(modes) != 1 or modes[0] not in POOLS:
        raise UserError(
            f"{path} asks for the pooling {' and '.join(modes) or 'of nothing'}, expected one of {', '.join(POOLS)}; "
            f"{REMOVE}"
        )
    return POOLS[modes[0]]


def _modes(config: Mapping[str, object]) -> Iterator[str]:
    named = config.get(MODE)
    if isinstance(named, str):
        yield named
        return
    yield from (key.removeprefix(f"{MODE}_") for key, value in config.items() if key.startswith(MODE) and value is True)
