"""Filling a folder with a version's files: from what is there already, from other artifacts, and from the store.

Every piece has its sum before it is written, so that a folder which was left half-filled is filled further. A file that
another artifact has is linked, which takes no space; a linked file is never written to, since the other artifact may be
open.
"""

import hashlib
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster.store.layout import Blob, blob_path
from cluster.store.lookup import Found
from cluster.store.pieces import for_each, pieces_of, read_piece
from cluster.store.storage import Store
from runtime.artifact.consistency import MANIFEST_FILE, check_manifest
from runtime.artifact.durable import link_or_copy
from runtime.artifact.folder import read_manifest
from runtime.artifact.hashing import Span, check_sums, span_sum
from runtime.artifact.manifest import FileEntry, Manifest
from runtime.artifact.signing import SIGNATURE_FILE
from runtime.errors import UserError
from runtime.progress import progress


def receive_manifest(store: Store, found: Found, fresh: Path) -> None:
    """Put a version's manifest and signature into a folder, in place of those that it holds."""
    for name, blob in ((MANIFEST_FILE, found.record.manifest), (SIGNATURE_FILE, found.record.signature)):
        data = None if blob is None else _received(store, blob)
        (fresh / name).unlink(missing_ok=True)
        if data is not None:
            (fresh / name).write_bytes(data)


def receive_files(store: Store, manifest: Manifest, fresh: Path, others: Sequence[Path]) -> int:
    """Fill a folder with the files of a manifest that was checked; returns how many bytes came from the store.

    `others` are artifacts on this machine whose files and pieces are taken where they have the right sums. Raises
    `UserError` if the store lacks a piece or has a damaged one, and if the disk is too small.
    """
    listed = {MANIFEST_FILE, SIGNATURE_FILE, *(entry.path for entry in manifest.files)}
    for path in fresh.iterdir():
        if path.name not in listed or path.stat().st_nlink > 1:  # a linked file is linked again, or made anew
            path.unlink()
    at_hand = [opened for other in others if (opened := _Other.of(other)) is not None]
    entries = [entry for entry in manifest.files if not _linked(entry, fresh, at_hand)]
    _check_space(fresh, entries)
    begun = {entry.path for entry in entries if (fresh / entry.path).exists()}
    for entry in entries:
        with (fresh / entry.path).open("ab") as file:
            file.truncate(entry.size)
    elsewhere = {piece.sha256: piece for other in at_hand for piece in pieces_of(other.folder, other.manifest.files)}
    with progress("receiving", sum(entry.size for entry in entries)) as advance:

        def receive(piece: Span) -> int:
            fetched = 0
            if piece.path.name not in begun or span_sum(piece) != piece.sha256:
                copy = elsewhere.get(piece.sha256)
                data = None if copy is None else read_piece(copy)
                if data is None:
                    data = _received(store, Blob(size=piece.length, sha256=piece.sha256))
                    fetched = piece.length
                with piece.path.open("r+b") as file:
                    file.seek(piece.start)
                    file.write(data)
            advance(piece.length)
            return fetched

        return sum(for_each(pieces_of(fresh, entries), receive))


@dataclass(frozen=True)
class _Other:
    """An artifact on this machine, whose contents have not been checked."""

    folder: Path
    manifest: Manifest

    @classmethod
    def of(cls, folder: Path) -> "_Other | None":
        with suppress(UserError, OSError):
            manifest = read_manifest(folder)
            check_manifest(manifest, str(folder / MANIFEST_FILE))
            return cls(folder, manifest)
        return None

    def whole(self, entry: FileEntry) -> Path | None:
        """Where a file with this sum lies, if it does and is not damaged."""
        for own in self.manifest.files:
            path = self.folder / own.path
            if own.sha256 == entry.sha256 and path.is_file() and not path.is_symlink():
                with suppress(UserError, OSError):
                    check_sums(self.folder, [own])
                    return path
        return None


def _linked(entry: FileEntry, fresh: Path, others: Sequence[_Other]) -> bool:
    """Whether a file is whole because another artifact has it."""
    target = fresh / entry.path
    for other in others:
        path = other.whole(entry)
        if path is not None:
            target.unlink(missing_ok=True)
            link_or_copy(path, target)
            return True
    return False


def _received(store: Store, blob: Blob) -> bytes:
    path = blob_path(blob.sha256)
    data = store.read(path, blob.size)
    if data is None:
        raise UserError(f"the store {store.address} lacks {path}; push the artifact again")
    if len(data) != blob.size or hashlib.sha256(data).hexdigest() != blob.sha256:
        raise UserError(
            f"{path} in the store {store.address} is damaged: it does not have the sum that it is named after; "
            "remove it, and push the artifact again"
        )
    return data


def _check_space(fresh: Path, entries: Sequence[FileEntry]) -> None:
    there = sum(path.stat().st_blocks * 512 for entry in entries if (path := fresh / entry.path).exists())
    needed, free = sum(entry.size for entry in entries) - there, shutil.disk_usage(fresh).free
    if needed > free:
        raise UserError(
            f"{fresh.parent} has {free / 1e9:,.1f} GB free, but {needed / 1e9:,.1f} GB are to be received; "
            "free some space on that disk, or choose another"
        )
