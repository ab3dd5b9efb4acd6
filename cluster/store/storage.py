"""The place of a store: a folder, an S3 bucket, or whatever else fsspec reaches.

Every method may be called by several threads. fsspec runs S3's requests in one event loop of its own, in which those of
all threads go on side by side.
"""

import errno
import time
import uuid
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from runtime.artifact.durable import replaced_whole
from runtime.errors import UserError, refusing

INCOMING = "incoming"
ABANDONED = 24 * 3600  # seconds after which nobody writes an incoming file any more
FOLDER_REMEDY = "check its path, its permissions and the space on its disk"
REMEDY = (
    "check the address, the network and what its library reads (for S3 AWS_ENDPOINT_URL, AWS_PROFILE or "
    "AWS_ACCESS_KEY_ID, and the key's permissions)"
)


@dataclass(frozen=True)
class Store:
    """Small files by their path below an address.

    Its methods raise `UserError` if the place cannot be reached, or refuses.
    """

    address: str
    _files: Any  # fsspec's file system
    _root: str

    @classmethod
    def open(cls, address: str) -> Self:
        """Find what reads an address such as `/srv/models` or `s3://bucket/prefix`; asks nothing of it yet."""
        with refusing(
            f"the store {address} cannot be used",
            "name a folder, or s3://BUCKET/PREFIX, for which s3fs of requirements/cluster.lock must be installed",
        ):
            # what another process has pushed meanwhile must be seen, so no listing is kept
            files, root = url_to_fs(address, use_listings_cache=False)
        if not root.strip("/"):
            raise UserError(f"the store {address} has no folder or bucket, expected one such as s3://BUCKET/PREFIX")
        return cls(address, files, root.rstrip("/"))

    @property
    def is_folder(self) -> bool:
        """Whether the store is a folder of this machine."""
        return isinstance(self._files, LocalFileSystem)

    def read(self, path: str, size: int) -> bytes | None:
        """The first `size` bytes of a file, or fewer if it is shorter; None if there is none."""
        with self._reaching("read"):
            try:
                return self._files.cat_file(self._at(path), start=0, end=size)
            except FileNotFoundError:
                return None
            except OSError as error:
                if error.errno == errno.EINVAL:  # how s3fs says that no byte of the range exists
                    return b""
                raise

    def read_small(self, path: str, most: int) -> bytes | None:
        """A whole file; None if there is none, or if it has more than `most` bytes."""
        size = self.size(path)
        return None if size is None or size > most else self.read(path, size)

    def size(self, path: str) -> int | None:
        """A file's size in bytes; None if there is none."""
        with self._reaching("read"):
            try:
                return int(self._files.info(self._at(path))["size"])
            except FileNotFoundError:
                return None

    def date(self, path: str) -> str:
        """When a file was written, as text; empty if the store does not say."""
        with self._reaching("read"):
            try:
                return f"{self._files.modified(self._at(path)):%Y-%m-%d %H:%M}"
            except (FileNotFoundError, NotImplementedError):
                return ""

    def children(self, path: str) -> list[str]:
        """The names of what lies directly below a path, sorted; raises `UserError` if the store itself is absent."""
        with self._reaching("read"):
            try:
                found = self._files.ls(self._at(path), detail=False)
            except FileNotFoundError:
                self._check_presence()
                return []
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in found)

    def write(self, path: str, data: bytes) -> None:
        """Write a file that appears whole or not at all: object stores see to that themselves."""
        with self._reaching("written to"):
            if self.is_folder:
                self._write_durably(Path(self._at(path)), data)
            else:
                self._files.pipe_file(self._at(path), data)

    def remove_abandoned(self) -> None:
        """Remove what writers that were killed long ago have left in a folder."""
        if not self.is_folder:
            return
        with self._reaching("written to"):
            for left in Path(self._at(INCOMING)).glob("*"):
                with suppress(FileNotFoundError):  # its writer has just finished
                    if time.time() - left.stat().st_mtime > ABANDONED:
                        left.unlink()

    def _write_durably(self, target: Path, data: bytes) -> None:
        fresh = Path(self._at(INCOMING)) / uuid.uuid4().hex  # several machines may write to one folder
        for folder in (target.parent, fresh.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with replaced_whole(target, fresh):
            fresh.write_bytes(data)

    def _check_presence(self) -> None:
        """Raise `UserError` if the folder, or the bucket, does not exist."""
        top = self._root if self.is_folder else self._root.lstrip("/").partition("/")[0]
        if not self._files.exists(top):
            kind = "folder" if self.is_folder else "bucket"
            raise UserError(f"there is no {kind} {top}, which the store {self.address} lies in; check the address")

    def _at(self, path: str) -> str:
        return f"{self._root}/{path}"

    def _reaching(self, deed: str) -> AbstractContextManager[None]:
        return refusing(f"the store {self.address} cannot be {deed}", FOLDER_REMEDY if self.is_folder else REMEDY)
