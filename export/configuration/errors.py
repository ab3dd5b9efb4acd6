"""Turns pydantic's errors about a config into one sentence: where, which key, what was found, what was expected."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import TypeAlias, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from export.configuration.yaml_source import KeyPath, Sourced, key_text, yaml_text

CONFLICT = "conflict"  # error type of a rule between settings, whose context names the key to report it at
UNKNOWN, MISSING, CONSEQUENCE = "extra_forbidden", "missing", "default_factory_not_called"

Section: TypeAlias = type[BaseModel]


def explain(errors: Sequence[ErrorDetails], root: Section, source: Sourced) -> str:
    """One sentence about the error to fix first: unknown keys, then wrong values, then missing keys."""
    wrong = [error for error in errors if error["type"] not in (UNKNOWN, MISSING, CONSEQUENCE)]
    unknown = [error["loc"] for error in errors if error["type"] == UNKNOWN]
    if unknown:
        return _unknown_key(unknown[0], root, source)
    if wrong:
        return (
            _conflict(wrong[0], source) if wrong[0]["type"] == CONFLICT else _wrong_value(wrong[0]["loc"], root, source)
        )
    return _missing_keys([error["loc"] for error in errors if error["type"] == MISSING], root, source)


def _unknown_key(path: KeyPath, root: Section, source: Sourced) -> str:
    parent, key = path[:-1], str(path[-1])
    valid = list(_keys(_section(root, parent)))
    close: list[KeyPath] = [(*parent, name) for name in get_close_matches(key, valid, n=1)]
    elsewhere = [leaf for leaf in _leaves(root) if leaf[-1] == key]
    hint = "".join(f"; did you mean {key_text(guess)}?" for guess in (close or elsewhere)[:1])
    level = f"in {key_text(parent)}" if parent else "at the top level"
    return f"{source.origin(path)}: unknown key {key_text(path)}, the valid keys {level} are {', '.join(valid)}{hint}"


def _conflict(error: ErrorDetails, source: Sourced) -> str:
    path = (*error["loc"], *error["ctx"]["key"].split("."))
    return f"{source.origin(path)}: {key_text(path)} {error['msg']}"


def _wrong_value(path: KeyPath, root: Section, source: Sourced) -> str:
    while path not in source.origins:  # pydantic adds the members of a union to the path
        path = path[:-1]
    origin = source.origin(path)
    while path and isinstance(path[-1], int):  # the expectation for an item is described at its list
        path = path[:-1]
    return f"{origin}: {key_text(path)} is {yaml_text(source.get(path))[:80]}, expected {_expected(path, root)}"


def _missing_keys(paths: Sequence[KeyPath], root: Section, source: Sourced) -> str:
    missing = [key_text(key) for path in paths for key in _required(path, root)]
    needed = ", ".join(key_text(key) for key in _required((), root))
    return f"{source.origin(paths[0])}: {' and '.join(missing)} not given, every config needs {needed}"


def _keys(section: Section) -> dict[str, FieldInfo]:
    """The fields of a section by their keys in the YAML file."""
    return {field.alias or name: field for name, field in section.model_fields.items()}


def _inner(field: FieldInfo) -> Section | None:
    """The section that a field holds, or None for a plain value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _section(root: Section, path: KeyPath) -> Section:
    """The section at a path that goes only through sections."""
    section = root
    for key in path:
        inner = _inner(_keys(section)[str(key)])
        assert inner is not None, f"{path} goes through a plain value"
        section = inner
    return section


def _expected(path: KeyPath, root: Section) -> str:
    """The values that the field at a path, or the field that holds it, accepts."""
    section = root
    for key in path:
        field = _keys(section)[str(key)]
        inner = _inner(field)
        if inner is None:
            return field.description or f"one of {', '.join(map(str, get_args(field.annotation)))}"
        section = inner
    return f"a mapping with the keys {', '.join(_keys(section))}"


def _leaves(section: Section, path: KeyPath = ()) -> list[KeyPath]:
    """Every key path below `section` that holds a plain value."""
    leaves: list[KeyPath] = []
    for key, field in _keys(section).items():
        inner = _inner(field)
        leaves += _leaves(inner, (*path, key)) if inner else [(*path, key)]
    return leaves


def _required(path: KeyPath, root: Section) -> list[KeyPath]:
    """The key paths at or below `path` that have no default."""
    section = _inner(_keys(_section(root, path[:-1]))[str(path[-1])]) if path else root
    if section is None:
        return [path]
    return [
        inner for key, field in _keys(section).items() if field.is_required() for inner in _required((*path, key), root)
    ]
