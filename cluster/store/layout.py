"""How a store is laid out, and how a version in it is named.

    blobs/sha256/SUM           a piece of a file, a manifest or a signature, by the SHA-256 of its bytes
    versions/NAME/VERSION.json `Version`: which manifest, signed by which signature; VERSION is its own SHA-256
    names/NAME/TAG.json        `Pointer`: the version that a tag means now; nothing else is ever replaced
    incoming/                  in a folder: files that are still being written

The pieces of a file are those by which its artifact is checked: blocks of 16 MiB, or the whole of a smaller file. So
each is verified by itself, a transfer goes on where it ended, and what two versions share is stored once. A version
leads to its manifest by a sum, and the manifest to every piece, so that a version never changes.
"""

import re
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import msgspec

from runtime.artifact.folder import MANIFEST_LIMIT
from runtime.artifact.manifest import BuildNumber, Record, Sha256
from runtime.errors import UserError

LATEST = "latest"  # the tag of a name that is given without one
SHORT = 12  # characters of a version that are shown
RECORD_LIMIT = 2**12  # bytes of a `Version` or `Pointer`; several times the longest
_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,49}")  # shorter than a version, so that no tag can hide one
_VERSION = re.compile(r"[0-9a-f]{64}")
_VERSION_PART = re.compile(r"[0-9a-f]{8,64}")


class Blob(Record, frozen=True):
    """A small file that is stored whole."""

    size: Annotated[int, msgspec.Meta(ge=1, le=MANIFEST_LIMIT)]
    sha256: Sha256


class Version(Record, frozen=True):
    """One version of an artifact."""

    layout: Literal[1]
    size: Annotated[int, msgspec.Meta(ge=0, le=2**60)]  # bytes of all its files, for lists
    build_number: BuildNumber
    manifest: Blob
    signature: Blob | None


class Pointer(Record, frozen=True):
    """What a tag means."""

    version: Sha256


def blob_path(sha256: str) -> str:
    """Where the bytes with a sum lie."""
    return f"blobs/sha256/{sha256}"


def version_path(name: str, version: str) -> str:
    """Where a version's record lies."""
    return f"versions/{name}/{version}.json"


def pointer_path(name: str, tag: str) -> str:
    """Where a tag lies."""
    return f"names/{name}/{tag}.json"


@dataclass(frozen=True)
class Reference:
    """A version as a person names it: NAME, NAME@TAG, or NAME@VERSION with at least its first 8 characters."""

    name: str
    tag: str

    @classmethod
    def read(cls, text: str) -> Self:
        """Read a reference; raises `UserError` for anything else."""
        name, separator, tag = text.partition("@")
        if not is_name(name) or (separator and not (is_tag(tag) or _VERSION_PART.fullmatch(tag))):
            raise UserError(
                f"{text!r} names no artifact of a store, expected NAME, NAME@TAG or NAME@VERSION, "
                "of letters, digits, '.', '_' and '-'"
            )
        return cls(name, tag or LATEST)

    @property
    def version(self) -> str | None:
        """The version, if it is given in full."""
        return self.tag if _VERSION.fullmatch(self.tag) else None

    def matches(self, version: str) -> bool:
        """Whether this is the beginning of a version."""
        return _VERSION_PART.fullmatch(self.tag) is not None and version.startswith(self.tag)

    def __str__(self) -> str:
        return f"{self.name}@{self.tag}"


def is_name(text: str) -> bool:
    """Whether an artifact may have this name in a store: it becomes a folder's."""
    return _NAME.fullmatch(text) is not None


def is_tag(text: str) -> bool:
    """Whether this can be a tag."""
    return _TAG.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Whether this is a version in full."""
    return _VERSION.fullmatch(text) is not None
