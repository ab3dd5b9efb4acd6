"""Reads the JSON and text files of a checkpoint, with one sentence for every way in which they can be wrong."""

import json
from pathlib import Path
from typing import TypeVar

import msgspec

from export.checkpoints.links import is_lfs_pointer, lfs_advice
from runtime.errors import UserError

SIZE_LIMIT = 64 * 2**20  # bytes; an index of many thousand tensors has a few
T = TypeVar("T")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object from a file; raises `UserError` if it is unreadable, not JSON, or not an object."""
    value = read_value(path)
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def read_value(path: Path) -> object:
    """Read any JSON value from a file; raises `UserError` if it is unreadable or not JSON."""
    try:
        value: object = json.loads(_read(path))
        json.dumps(value, ensure_ascii=False).encode()  # refuses a lone surrogate, which no file can be written with
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}; fetch the checkpoint again") from error
    return value


def read_optional_json(path: Path) -> dict[str, object]:
    """As `read_json`; an empty object if there is no such file."""
    return read_json(path) if path.is_file() else {}


def read_text(path: Path) -> str:
    """Read a text in UTF-8, without a byte order mark.

    Raises `UserError` if it is unreadable, too long, or in another encoding.
    """
    try:
        return _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8: {error.reason} at byte {error.start}; convert it") from error


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if is_lfs_pointer(path):
            raise UserError(lfs_advice(path))
        if size <= SIZE_LIMIT:
            return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    raise UserError(f"{path} has {size} bytes, expected at most {SIZE_LIMIT}; fetch the checkpoint again")


def convert(value: object, kind: type[T], path: Path | str) -> T:
    """Convert a JSON value to `kind`; raises `UserError` naming `path` if it does not fit."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is malformed: {error}; fetch the checkpoint again") from error
