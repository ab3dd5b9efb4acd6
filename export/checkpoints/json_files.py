"""Reads the JSON files of a checkpoint, with one sentence for every way in which they can be wrong."""

import json
from pathlib import Path
from typing import TypeVar

import msgspec

from runtime.errors import UserError

T = TypeVar("T")


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object from a file; raises `UserError` if it is unreadable, not JSON, or not an object."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}; fetch the checkpoint again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected an object")
    return value


def convert(value: object, kind: type[T], path: Path | str) -> T:
    """Convert a JSON value to `kind`; raises `UserError` naming `path` if it does not fit."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path} is malformed: {error}; fetch the checkpoint again") from error
