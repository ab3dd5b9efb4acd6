"""Names, tags and versions in a store. What is read here may be anybody's: names are checked, and sizes bounded."""

import hashlib
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from cluster.store.layout import (
    RECORD_LIMIT,
    SHORT,
    Pointer,
    Reference,
    Version,
    is_name,
    is_tag,
    is_version,
    pointer_path,
    version_path,
)
from cluster.store.storage import Store
from runtime.artifact.manifest import Record
from runtime.errors import UserError

MOST_SHOWN = 20  # names in an error

T = TypeVar("T", bound=Record)


@dataclass(frozen=True)
class Found:
    """A version in a store."""

    name: str
    version: str
    record: Version

    def __str__(self) -> str:
        return f"{self.name}@{self.version[:SHORT]}"


def resolve(store: Store, asked: Reference) -> str:
    """The version that a reference means now; raises `UserError` with those that exist if it means none."""
    if asked.version is not None:
        return asked.version
    tagged = read_tag(store, asked.name, asked.tag)
    if tagged is not None:
        return tagged
    begun = [version for version in versions_of(store, asked.name) if asked.matches(version)]
    if len(begun) == 1:
        return begun[0]
    raise UserError(_not_found(store, asked))


def find(store: Store, asked: Reference) -> Found:
    """The version that a reference means, with its record; raises `UserError` if there is none, or it is damaged."""
    version = resolve(store, asked)
    record = read_version(store, asked.name, version)
    if record is None:
        raise UserError(_not_found(store, asked))
    return Found(asked.name, version, record)


def names_of(store: Store) -> list[str]:
    """The names of all artifacts."""
    return [name for name in store.children("names") if is_name(name)]


def tags_of(store: Store, name: str) -> list[str]:
    """The tags of an artifact."""
    stems = (child.removesuffix(".json") for child in store.children(f"names/{name}"))
    return [tag for tag in stems if is_tag(tag)]


def versions_of(store: Store, name: str) -> list[str]:
    """The versions of an artifact, whether a tag means them or not."""
    stems = (child.removesuffix(".json") for child in store.children(f"versions/{name}"))
    return [version for version in stems if is_version(version)]


def read_tag(store: Store, name: str, tag: str) -> str | None:
    """The version that a tag means; None if there is no such tag."""
    path = pointer_path(name, tag)
    data = store.read_small(path, RECORD_LIMIT)
    return None if data is None else _decoded(store, path, data, Pointer).version


def read_version(store: Store, name: str, version: str) -> Version | None:
    """A version's record, which must have its sum; None if there is none."""
    path = version_path(name, version)
    data = store.read_small(path, RECORD_LIMIT)
    if data is None:
        return None
    if hashlib.sha256(data).hexdigest() != version:
        raise UserError(f"{path} in the store {store.address} is damaged; remove it, and push the artifact again")
    return _decoded(store, path, data, Version)


def _decoded(store: Store, path: str, data: bytes, kind: type[T]) -> T:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} in the store {store.address} cannot be read: {error}; use the software that pushed it, or push "
            "the artifact again"
        ) from error


def _not_found(store: Store, asked: Reference) -> str:
    tags = [f"{asked.name}@{tag}" for tag in tags_of(store, asked.name)]
    found = tags or names_of(store)
    if not found:
        return f"the store {store.address} has no {asked}, nor any other artifact; push one, or check the address"
    shown = ", ".join(found[:MOST_SHOWN]) + (", ..." if len(found) > MOST_SHOWN else "")
    return f"the store {store.address} has no {asked}, but it has {shown}; name one of those"
