"""`python -m cluster.store.push ARTIFACT STORE`: put a version of an artifact into a store.

Pieces that the store has are not sent again. What names them is written after them: the version's record, and then its
tags, so that nobody sees a version that is not complete. A push that was interrupted goes on where it ended, and two at
once write the same bytes to the same places; of two tags, the later one holds.
"""

import argparse
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cluster.store.layout import (
    LATEST,
    SHORT,
    Blob,
    Pointer,
    Version,
    blob_path,
    is_name,
    is_tag,
    pointer_path,
    version_path,
)
from cluster.store.pieces import for_each, pieces_of, read_piece
from cluster.store.storage import Store
from runtime.artifact import manifest as contract
from runtime.artifact.build_number import required_build
from runtime.artifact.consistency import MANIFEST_FILE
from runtime.artifact.folder import Artifact
from runtime.artifact.hashing import Span
from runtime.artifact.signing import SIGNATURE_FILE, key_of_environment
from runtime.errors import UserError, run_command
from runtime.progress import progress


@dataclass(frozen=True)
class Pushed:
    """What a push has sent, or would send."""

    name: str
    version: str
    size: int  # bytes of all files
    sent: tuple[str, ...]  # files of which pieces were sent
    sent_bytes: int


def push(
    folder: Path, store: Store, name: str | None = None, tags: Sequence[str] = (LATEST,), *, dry_run: bool = False
) -> Pushed:
    """Put an artifact into a store under `name`, by default its folder's, and let the tags mean it.

    `dry_run` only finds what would be sent. Raises `UserError` for an artifact that fails a check of `Artifact.open`,
    or changes meanwhile, for a name or tag of other characters, and for a store that cannot be written to.
    """
    folder = Path(os.path.abspath(folder))  # a link has a name of its own
    name = folder.name if name is None else name
    _check_names(name, tags)
    artifact = Artifact.open(
        folder, for_this_machine=False, public_key=key_of_environment(), minimum_build=required_build()
    )
    signed = _signed_manifest(artifact)
    distinct = {piece.sha256: piece for piece in pieces_of(folder, artifact.manifest.files)}
    missing = [piece for piece in for_each(list(distinct.values()), lambda piece: _absent(store, piece)) if piece]
    record = Version(
        layout=1,
        size=sum(entry.size for entry in artifact.manifest.files) + sum(map(len, signed)),
        build_number=artifact.manifest.build_number,
        manifest=_blob(signed[0]),
        signature=_blob(signed[1]) if len(signed) > 1 else None,
    )
    data = contract.to_json(record)
    version = hashlib.sha256(data).hexdigest()
    if not dry_run:
        store.remove_abandoned()
        _send(store, missing)
        for small in signed:
            store.write(blob_path(_blob(small).sha256), small)
        store.write(version_path(name, version), data)
        for tag in tags:
            store.write(pointer_path(name, tag), contract.to_json(Pointer(version=version)))
    sent = tuple(sorted({piece.path.name for piece in missing}))
    return Pushed(name, version, record.size, sent, sum(piece.length for piece in missing))


def _check_names(name: str, tags: Sequence[str]) -> None:
    for kind, text, allowed in (("name", name, is_name(name)), *(("tag", tag, is_tag(tag)) for tag in tags)):
        if not allowed:
            raise UserError(
                f"the {kind} {text!r} cannot be used in a store, expected letters, digits, '.', '_' and '-', without a "
                f"leading dot, at most 200 in a name and 50 in a tag; choose another with --{kind}"
            )


def _signed_manifest(artifact: Artifact) -> list[bytes]:
    """The bytes of the manifest and, if there is one, of its signature."""
    path, signature = artifact.folder / MANIFEST_FILE, artifact.folder / SIGNATURE_FILE
    data = path.read_bytes()
    if contract.from_json(data, contract.Manifest, str(path)) != artifact.manifest:
        raise UserError(_changed(path))
    return [data, signature.read_bytes()] if signature.exists() else [data]


def _blob(data: bytes) -> Blob:
    return Blob(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _absent(store: Store, piece: Span) -> Span | None:
    """The piece, if the store does not have it in full."""
    return None if store.size(blob_path(piece.sha256)) == piece.length else piece


def _send(store: Store, pieces: Sequence[Span]) -> None:
    with progress("sending", sum(piece.length for piece in pieces)) as advance:

        def send(piece: Span) -> None:
            data = read_piece(piece)
            if data is None:
                raise UserError(_changed(piece.path))
            store.write(blob_path(piece.sha256), data)
            advance(piece.length)

        for_each(pieces, send)


def _changed(path: Path) -> str:
    return f"{path} changed while it was pushed; push the artifact again while nothing else writes there"


def main() -> int:
    """Push one artifact; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.store.push", description="Put a version of an artifact into a store."
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument("store", metavar="STORE", help="a folder, or s3://BUCKET/PREFIX")
    parser.add_argument("--name", help="the artifact's name in the store (default: its folder's)")
    parser.add_argument(
        "--tag",
        action="append",
        metavar="TAG",
        help=f"let NAME@TAG mean this version; may be given several times (default: {LATEST}, which NAME alone means)",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be sent")
    args = parser.parse_args()
    tags = args.tag or [LATEST]
    pushed = push(args.artifact, Store.open(args.store), args.name, tags, dry_run=args.dry_run)
    files = f" ({', '.join(pushed.sent)})" if pushed.sent else ""
    print(
        f"{pushed.name}@{pushed.version[:SHORT]}: {'would send' if args.dry_run else 'sent'} "
        f"{pushed.sent_bytes / 1e6:,.1f} of {pushed.size / 1e6:,.1f} MB{files}"
    )
    if not args.dry_run:
        print(f"{', '.join(f'{pushed.name}@{tag}' for tag in tags)} in {args.store} now means it")
    return 0


if __name__ == "__main__":
    run_command(main)
