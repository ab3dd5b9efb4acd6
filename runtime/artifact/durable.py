"""Files that survive a crash: they appear whole or not at all, and are on the disk before anything relies on them."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Flush a file's or a folder's contents to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def replaced_whole(target: Path, fresh: Path | None = None) -> Iterator[Path]:
    """Yield a path to write to, which becomes `target` when the block ends, and is removed if the block fails.

    The path is a sibling of `target`, unless `fresh` names another one on the same disk.
    """
    written = fresh or target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield written
        sync(written)
        written.replace(target)
    finally:
        written.unlink(missing_ok=True)
    sync(target.parent)


def write_whole(target: Path, data: bytes) -> None:
    """Write a small file that appears whole or not at all."""
    with replaced_whole(target) as fresh:
        fresh.write_bytes(data)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, which takes no space; copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
