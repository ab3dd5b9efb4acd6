"""The archive for a box: its members, the file of their sums with its signature, and how it is written.

`install.sh` on the box checks SHA256SUMS, which is in the form of `sha256sum`, before it runs anything else, and the
signature of that file where it is given a public key.
"""

import hashlib
import os
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BufferedReader, BytesIO
from pathlib import Path

import psutil
import zstandard

from build.shipping.keys import signature_line
from export.console import byte_bar
from runtime.artifact.durable import replaced_whole
from runtime.errors import UserError

LEVEL = 6  # of compression: weights hardly shrink, and a higher level takes longer than the copy saves
SUMS_FILE, SUMS_SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"


@dataclass(frozen=True)
class Member:
    """One file of the archive: its source, a file or bytes, and the row of the summary that it counts in.

    `known_sum` is its SHA-256 where somebody has computed it: an artifact's manifest has those of gigabytes.
    """

    source: Path | bytes
    part: str
    executable: bool = False
    known_sum: str | None = None

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size

    @cached_property
    def sha256(self) -> str:
        """The SHA-256 that the file must have when it is written into the archive."""
        if self.known_sum is not None:
            return self.known_sum
        with self.open() as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def open(self) -> BufferedReader | BytesIO:
        """The content, to be read."""
        return BytesIO(self.source) if isinstance(self.source, bytes) else self.source.open("rb")


def with_sums(members: Mapping[str, Member], private_key: Path | None) -> dict[str, Member]:
    """The members by path, sorted, with the file of their sums and, if there is a key, its signature."""
    sums = "".join(f"{member.sha256}  {path}\n" for path, member in sorted(members.items())).encode()
    added = {SUMS_FILE: Member(sums, "runtime")}
    if private_key is not None:
        added[SUMS_SIGNATURE] = Member(signature_line(sums, private_key).encode(), "runtime")
    return dict(sorted({**members, **added}.items()))


def write_archive(members: Mapping[str, Member], name: str, target: Path) -> None:
    """Write `target`, complete or not at all, with every member below the folder `name`.

    Raises `UserError` if a file changes meanwhile, so that no archive holds parts of two artifacts.
    """
    _remove_stale(target)
    with replaced_whole(target) as fresh:
        compressor = zstandard.ZstdCompressor(level=LEVEL, threads=-1)
        with (
            fresh.open("wb") as file,
            compressor.stream_writer(file) as stream,
            tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            byte_bar("shipping", sum(member.size for member in members.values())) as bar,
        ):
            for path, member in members.items():
                info = tarfile.TarInfo(f"{name}/{path}")
                info.size = member.size
                info.mode = 0o755 if member.executable else 0o644
                with member.open() as source:
                    summed = _Summed(source)
                    tar.addfile(info, summed)  # type: ignore[arg-type]  # only ever reads
                if summed.sum.hexdigest() != member.sha256:
                    raise UserError(
                        f"{member.source if isinstance(member.source, Path) else path} changed while it was shipped, "
                        f"expected SHA-256 {member.sha256}; ship it again while nothing else writes there"
                    )
                bar.advance(member.size)


class _Summed:
    """A file that is read, and the sum of what was read."""

    def __init__(self, file: BufferedReader | BytesIO) -> None:
        self._file = file
        self.sum = hashlib.sha256()

    def read(self, size: int) -> bytes:
        """The next bytes."""
        data = self._file.read(size)
        self.sum.update(data)
        return data


def _remove_stale(target: Path) -> None:
    """Remove what killed runs left of this archive."""
    for path in target.parent.glob(f".{target.name}.*"):
        match = re.fullmatch(rf"\.{re.escape(target.name)}\.(?:([0-9]{{1,9}})\.)?tmp", path.name)
        if match and not (match[1] and int(match[1]) != os.getpid() and psutil.pid_exists(int(match[1]))):
            path.unlink(missing_ok=True)
