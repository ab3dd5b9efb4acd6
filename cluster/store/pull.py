"""`python -m cluster.store.pull STORE NAME FOLDER`: take a version of an artifact out of a store.

It is gathered in a hidden folder beside the target, opened there as the runtime opens it, with its signature if a key
is given, and renamed. So the target is the old artifact or the new one, and a server that has the old one open keeps
its files. A pull that was interrupted goes on where it ended.
"""

import argparse
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.store.layout import Reference
from cluster.store.locking import held
from cluster.store.lookup import Found, find
from cluster.store.receiving import receive_files, receive_manifest
from cluster.store.storage import Store
from runtime.artifact.build_number import add_minimum_build, check_build_number, required_build
from runtime.artifact.consistency import MANIFEST_FILE, check_manifest
from runtime.artifact.folder import Artifact, put_in_place, read_manifest
from runtime.artifact.replacing import refuse_other_folder, remove_stale, strange_entry
from runtime.artifact.signing import add_public_key, key_of_environment
from runtime.errors import UserError, run_command

_STORE_ADDRESS = re.compile(r"([a-z][a-z0-9+.-]*:///?[^/].*)/([^/]+)", re.DOTALL)


@dataclass(frozen=True)
class Trust:
    """What an artifact must have to be taken: a signature by the owner of a key, if there is one, and a build."""

    public_key: Path | None
    minimum_build: int

    @classmethod
    def required(cls, public_key: Path | None = None, minimum_build: int = 0) -> "Trust":
        """What was asked for, and what this environment requires, as wherever an artifact is opened."""
        return cls(public_key or key_of_environment(), required_build(minimum_build))


@dataclass(frozen=True)
class Pulled:
    """What a pull has brought."""

    found: Found
    fetched_bytes: int  # from the store, besides manifest and signature


def pull(store: Store, asked: Reference, folder: Path, trust: Trust) -> Pulled:
    """Make `folder` a version of an artifact; files that its present artifact has as well are not fetched.

    Raises `UserError` if there is no such version, for a folder that is no artifact, and for a version that is damaged,
    incomplete, not signed as required or older than required. Then the folder stays as it was.
    """
    folder = folder.resolve()
    refuse_other_folder(folder)
    found = find(store, asked)
    with _locked(folder):
        return Pulled(found, _gather(store, found, folder, [folder], trust))


def artifact_at(address: str, cache: Path, public_key: Path | None = None) -> Path:
    """The folder of an artifact that is given by a local folder, or by an address such as `s3://bucket/prefix/demo@v2`.

    A local folder is returned as it is. From a store (`s3://...`, `file://...`), each version is pulled once into
    `cache`, as CACHE/VERSION/NAME, also if several processes of a node ask for it at once. It is checked whenever it
    is returned, with its signature and build number as in `Engine.open`. Raises `UserError` as `pull` does.
    """
    if "://" not in address:
        return Path(address)
    parts = _STORE_ADDRESS.fullmatch(address.rstrip("/"))
    if parts is None:
        raise UserError(f"{address} names no artifact in a store, expected an address such as s3://BUCKET/PREFIX/NAME")
    trust, store = Trust.required(public_key), Store.open(parts[1])
    found = find(store, Reference.read(parts[2]))
    folder = cache.resolve() / found.version / found.name
    with _locked(folder):
        if not _is_sound(folder, trust):
            refuse_other_folder(folder)
            _gather(store, found, folder, sorted(cache.resolve().glob(f"*/{found.name}")), trust)
    return folder


def _is_sound(folder: Path, trust: Trust) -> bool:
    try:
        Artifact.open(folder, for_this_machine=False, public_key=trust.public_key, minimum_build=trust.minimum_build)
    except UserError:
        return False
    return True


def _gather(store: Store, found: Found, folder: Path, others: Sequence[Path], trust: Trust) -> int:
    """Fill the folder beside the target, whose lock is held, and put it in place; returns the bytes from the store."""
    remove_stale(folder)
    fresh = _beside(folder, "pull")
    if os.path.lexists(fresh) and (strange := strange_entry(fresh)) is not None:
        raise UserError(f"{fresh} is in the way, and no pull has left it ({strange}); move it")
    fresh.mkdir(exist_ok=True)
    try:
        receive_manifest(store, found, fresh)
        with _removed_if_refused(fresh):
            manifest = read_manifest(fresh, trust.public_key)
            check_build_number(fresh, manifest.build_number, trust.minimum_build)
            check_manifest(manifest, str(fresh / MANIFEST_FILE))
        fetched = receive_files(store, manifest, fresh, others)
        with _removed_if_refused(fresh):
            put_in_place(
                fresh, folder, for_this_machine=False, public_key=trust.public_key, minimum_build=trust.minimum_build
            )
    except UserError as error:
        raise UserError(f"{found} was not pulled: {error}") from error
    return fetched


@contextmanager
def _removed_if_refused(fresh: Path) -> Iterator[None]:
    """Keep nothing of an artifact that is refused; what is only incomplete is kept, for the next pull."""
    try:
        yield
    except UserError:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with held(_beside(folder, "pull.lock")):
            yield
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}; choose another folder or fix its permissions"
        ) from error


def _beside(folder: Path, kind: str) -> Path:
    """The same path for every process, so that the next one goes on with it."""
    return folder.with_name(f".{folder.name}.{kind}")


def main() -> int:
    """Pull one artifact; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster.store.pull", description="Take a version of an artifact out of a store."
    )
    parser.add_argument("store", metavar="STORE", help="a folder, or s3://BUCKET/PREFIX")
    parser.add_argument(
        "name", metavar="NAME", help="NAME, NAME@TAG or NAME@VERSION, as `python -m cluster.store.list` shows them"
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to put it; an artifact there is replaced")
    add_public_key(parser)
    add_minimum_build(parser)
    args = parser.parse_args()
    trust = Trust.required(args.public_key, args.minimum_build)
    pulled = pull(Store.open(args.store), Reference.read(args.name), args.folder, trust)
    size = pulled.found.record.size / 1e6
    signed = "" if trust.public_key is None else f", signed by the owner of {trust.public_key}"
    print(f"{args.folder} is {pulled.found}: fetched {pulled.fetched_bytes / 1e6:,.1f} of {size:,.1f} MB{signed}")
    return 0


if __name__ == "__main__":
    run_command(main)
