"""SHA-256 of files: the plain sum that `sha256sum` prints, and sums of 16 MiB blocks, to be checked in parallel."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from runtime.artifact.manifest import FileEntry
from runtime.errors import UserError

BLOCK_BYTES = 16 * 2**20
_READ_BYTES = 2**20  # fits the second-level cache, so that the hash reads there what the copy just wrote


@dataclass(frozen=True)
class Span:
    """A range of bytes of one file and the SHA-256 that it must have; `part` is its name in an error."""

    path: Path
    part: str
    start: int
    length: int
    sha256: str


def n_blocks(size: int) -> int:
    """Length of `FileEntry.blocks` for a file of `size` bytes: 0 up to one block, otherwise its blocks, rounded up."""
    return 0 if size <= BLOCK_BYTES else -(-size // BLOCK_BYTES)


def file_entry(path: Path) -> FileEntry:
    """Read the file once and return its entry: name, size, plain sum, and block sums if it is larger than a block."""
    size, whole, blocks = 0, hashlib.sha256(), []
    with path.open("rb") as file, ThreadPoolExecutor(max_workers=1) as pool:
        while block := file.read(BLOCK_BYTES):
            size += len(block)
            digest = pool.submit(hashlib.sha256, block)
            whole.update(block)
            blocks.append(digest.result().hexdigest())
    return FileEntry(
        path=path.name, size=size, sha256=whole.hexdigest(), blocks=tuple(blocks) if n_blocks(size) else ()
    )


def check_sums(folder: Path, entries: Iterable[FileEntry]) -> None:
    """Hash the files in `folder` on all cores (hashlib releases the interpreter's lock).

    Raises `UserError` at the first difference. A file with block sums is checked by those alone: together they cover
    every byte, and unlike the plain sum they can be computed in parallel.
    """
    spans = [span for entry in entries for span in spans_of(folder, entry)]
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
        for span, found in zip(spans, pool.map(span_sum, spans), strict=True):
            if found != span.sha256:
                raise UserError(
                    f"{span.path} is damaged: {span.part} has SHA-256 {found[:16]}..., "
                    f"but the manifest says {span.sha256[:16]}...; copy the artifact again or compile it again"
                )


def spans_of(folder: Path, entry: FileEntry) -> list[Span]:
    """The pieces by which a file is checked, in order: the blocks of a large file, or the whole of a small one."""
    path = folder / entry.path
    if not entry.blocks:
        return [Span(path, "the file", 0, entry.size, entry.sha256)]
    starts = range(0, entry.size, BLOCK_BYTES)
    return [
        Span(
            path, f"block {i} of {len(starts)} (from byte {start})", start, min(BLOCK_BYTES, entry.size - start), sha256
        )
        for i, (start, sha256) in enumerate(zip(starts, entry.blocks, strict=True), start=1)
    ]


def span_sum(span: Span) -> str:
    """SHA-256 of the span; read, not mapped, so that a file that shrinks meanwhile gives a wrong sum, not a signal."""
    digest, buffer, left = hashlib.sha256(), memoryview(bytearray(_READ_BYTES)), span.length
    with span.path.open("rb", buffering=0) as file:
        file.seek(span.start)
        while left and (n := file.readinto(buffer[: min(left, _READ_BYTES)])):
            digest.update(buffer[:n])
            left -= n
    return digest.hexdigest()
