"""What the reader of a checkpoint format hands over: hyper-parameters, tensors and tokenizer under the format's own names."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from export.checkpoints.families import Family
from runtime.artifact.manifest import InstructVersion

SMALL_FILE = 16 * 2**20  # bytes; files up to here count with all their bytes
HEADER_BYTES = 2**20  # bytes of a larger file that count: they hold its header, so names, dtypes and shapes

Array = NDArray[Any]


@dataclass(frozen=True)
class TokenizerSource:
    """The tokenizer's file as bytes, and how prompts begin and end."""

    kind: Literal["tokenizer.json", "sentencepiece"]
    data: bytes
    chat_template: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    end_id: int | None = None  # what the tokenizer puts behind a whole text
    instruct: InstructVersion | None = None  # None where there is a template, and for a base model


@dataclass(frozen=True)
class SourceTensor:
    """One tensor as the checkpoint stores it; `dtype` is the one that reading gives, `nbytes` what it takes on disk."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class TensorSource(Protocol):
    """The tensors of a checkpoint under its own names, read one at a time."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name, known without touching data."""

    def read(self, name: str, rows: slice) -> Array:
        """Rows of one tensor in row-major order, as float32, float16 or `ml_dtypes.bfloat16`; holds no more than them in memory."""


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose headers have been read; `values` are hyper-parameters by the format's keys, found in the file `where`."""

    family: Family
    values: Mapping[str, object]
    where: str
    source: TensorSource
    tokenizer: TokenizerSource | None
    notes: tuple[str, ...] = ()  # what a person should know about how the checkpoint was read, a sentence each


def identity(files: Sequence[Path]) -> str:
    """SHA-256 over the files' names and contents; of a large file only its size, its time of change and its first bytes count."""
    digest = hashlib.sha256()
    for path in sorted(files):
        status = path.stat()
        small = status.st_size <= SMALL_FILE
        with path.open("rb") as file:
            head = file.read(SMALL_FILE if small else HEADER_BYTES)
        mark = (path.name, status.st_size, 0 if small else status.st_mtime_ns, hashlib.sha256(head).hexdigest())
        digest.update(repr(mark).encode())
    return digest.hexdigest()
