"""The result of reading a checkpoint format: hyperparameters, tensors and tokenizer under the format's own names."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, Literal, Protocol

from numpy.typing import NDArray

from export.checkpoints.encodings.encoding import EncodedMatrix
from export.checkpoints.families import Family
from export.checkpoints.rope_settings import Rotary
from runtime.artifact.manifest import InstructVersion, TextAfterAdded

SMALL_FILE = 16 * 2**20  # bytes; of files up to this size, all bytes count
SAMPLES, SAMPLE_BYTES = 64, 2**18  # blocks of a larger file that count, the first and the last among them

Array = NDArray[Any]
TokenizerKind = Literal["tokenizer.json", "sentencepiece"]


@dataclass(frozen=True)
class TokenizerSource:
    """The tokenizer's file as bytes, and how prompts begin and end."""

    kind: TokenizerKind
    data: bytes
    chat_template: str | None
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool
    end_id: int | None = None  # the token that the tokenizer puts after a whole text
    instruct: InstructVersion | None = None  # None if there is a chat template, and for a base model
    special_tokens: Mapping[str, str] | None = None  # as in `TokenizerSpec`
    model_settings: str | None = None  # JSON that the instruct format v15 writes before the first user message
    text_after_added: TextAfterAdded = "joined"  # of a SentencePiece model


@dataclass(frozen=True)
class SourceTensor:
    """One tensor as the checkpoint stores it; `dtype` is the dtype it is read as, `nbytes` its size on disk."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    encoded: EncodedMatrix | None = None  # a quantized matrix that can be carried as it is
    packing: str | None = None  # the format of quantized numbers, such as Q4_1; None: plain numbers


class TensorSource(Protocol):
    """The tensors of a checkpoint under its own names, read one at a time."""

    @property
    def tensors(self) -> Mapping[str, SourceTensor]:
        """Every tensor by name, known without reading any data."""

    def read(self, name: str, rows: slice) -> Array:
        """Rows (n, columns) of one tensor in the shape `matrix_shape`, as float32, float16 or `ml_dtypes.bfloat16`.

        Holds no more than these rows in memory.
        """


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose headers have been read; `values` are hyperparameters by the format's keys, from `where`."""

    family: Family
    values: Mapping[str, object]
    where: str
    source: TensorSource
    tokenizer: TokenizerSource | None
    notes: tuple[str, ...] = ()  # for the user, on how the checkpoint was read; one sentence each
    rotary: Rotary = field(default_factory=Rotary)


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a tensor as a matrix: every axis but the last counts rows; (n,) of a vector and () stay."""
    return shape if len(shape) < 2 else (prod(shape[:-1]), shape[-1])


def identity(files: Sequence[Path]) -> str:
    """SHA-256 of the files' names and contents.

    Of a large file count its size, its times, its inode and `SAMPLES` blocks of its bytes. The system sets the change
    time itself, so a file that was rewritten always counts as another one.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        status = path.stat()
        small = status.st_size <= SMALL_FILE
        times = () if small else (status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
        mark = (path.name, status.st_size, times, _sampled(path, status.st_size if small else None))
        digest.update(repr(mark).encode())
    return digest.hexdigest()


def _sampled(path: Path, whole: int | None) -> str:
    """SHA-256 of the `whole` bytes of a file or, if that is None, of blocks from its start to its end."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        if whole is not None:
            digest.update(file.read(whole))
        else:
            last = file.seek(0, 2) - SAMPLE_BYTES
            for i in range(SAMPLES):
                file.seek(last * i // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
