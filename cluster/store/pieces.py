"""The pieces of an artifact's files: reading one, and working on many of them side by side."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from runtime.artifact.hashing import Span, spans_of
from runtime.artifact.manifest import FileEntry

THREADS = 8  # so many pieces of 16 MiB are on their way at once; an S3 client has each in memory up to three times

T = TypeVar("T")


def pieces_of(folder: Path, entries: Iterable[FileEntry]) -> list[Span]:
    """All pieces of files in a folder."""
    return [span for entry in entries for span in spans_of(folder, entry)]


def read_piece(piece: Span) -> bytes | None:
    """The bytes of a piece; None if the file does not have them, or they do not have their sum."""
    try:
        with piece.path.open("rb", buffering=0) as file:
            file.seek(piece.start)
            data = file.read(piece.length)
    except OSError:
        return None
    return data if has_sum(data, piece) else None


def has_sum(data: bytes, piece: Span) -> bool:
    """Whether bytes are those of a piece."""
    return len(data) == piece.length and hashlib.sha256(data).hexdigest() == piece.sha256


def for_each(pieces: Sequence[Span], work: Callable[[Span], T]) -> list[T]:
    """The results of work on all pieces, in no order, by a bounded number of threads.

    After a failure, which is raised, no further piece is begun.
    """
    with ThreadPoolExecutor(max_workers=THREADS) as pool:
        tasks = [pool.submit(work, piece) for piece in pieces]
        try:
            return [task.result() for task in as_completed(tasks)]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
