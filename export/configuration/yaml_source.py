"""Reads YAML into plain data and remembers where each value came from, so that an error can name the line.

The dialect is YAML 1.2's core schema: `1e-5` is a number and `no` is text, the opposite of PyYAML's own YAML 1.1.
Aliases, tags of other types and duplicate keys are refused: a config says each thing once, where it can be seen.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from yaml import (
    AliasEvent,
    MappingNode,
    MarkedYAMLError,
    Node,
    SafeLoader,
    ScalarNode,
    SequenceNode,
    compose,
    safe_dump,
)
from yaml.reader import ReaderError

from runtime.errors import UserError

Scalar: TypeAlias = int | float | str | bool | None
Value: TypeAlias = "Scalar | list[Value] | dict[str, Value]"
KeyPath: TypeAlias = tuple[str | int, ...]

LONGEST_NUMBER = 400  # characters; Python neither reads nor writes numbers of thousands of digits
DEEPEST = 16  # parts of a key path; no setting has more than three
PLAIN_TEXT = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./+-]*")
STR_TAG, NULL_TAG, BOOL_TAG, INT_TAG, FLOAT_TAG, SEQ_TAG, MAP_TAG = (
    f"tag:yaml.org,2002:{name}" for name in ("str", "null", "bool", "int", "float", "seq", "map")
)
TAGS = {MappingNode: {MAP_TAG}, SequenceNode: {SEQ_TAG}, ScalarNode: {STR_TAG, NULL_TAG, BOOL_TAG, INT_TAG, FLOAT_TAG}}


class CoreLoader(SafeLoader):
    """PyYAML's parser with the scalars of the core schema and without aliases."""

    yaml_implicit_resolvers = {  # noqa: RUF012  # PyYAML's own attribute; None stands for any first character
        None: [
            (NULL_TAG, re.compile(r"(~|null|Null|NULL|)\Z")),
            (BOOL_TAG, re.compile(r"(true|True|TRUE|false|False|FALSE)\Z")),
            (INT_TAG, re.compile(r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")),
            (FLOAT_TAG, re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")),
        ]
    }

    def compose_node(self, parent: Node | None, index: int) -> Node | None:
        """Compose one node; an alias could make the tree endless, so it is an error."""
        if self.check_event(AliasEvent):
            raise MarkedYAMLError(problem="aliases are not supported", problem_mark=self.peek_event().start_mark)  # type: ignore[no-untyped-call]
        return super().compose_node(parent, index)


@dataclass(frozen=True)
class Sourced:
    """Plain data and the origin of each of its key paths: `file:line`, or the `--set` that gave it."""

    data: Value
    origins: Mapping[KeyPath, str]

    def origin(self, path: KeyPath) -> str:
        """The origin of `path`; for a path that was not given, the origin of its nearest parent."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def get(self, path: KeyPath) -> Value:
        """The value at a path that is in `origins`."""
        value = self.data
        for key in path:
            value = value[key]  # type: ignore[index]
        return value


def key_text(path: KeyPath) -> str:
    """A key path as it is usually written: `shape.prefill_chunk[1]`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path).removeprefix(".")


def yaml_text(value: Value) -> str:
    """A value in YAML's flow style on one line, which this module reads back as the same value."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{yaml_text(key)}: {yaml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(yaml_text(item) for item in value) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        return (
            value
            if _is_plain(value)
            else safe_dump(value, default_style='"', width=2**31, allow_unicode=True).rstrip("\n")
        )
    return repr(value)


def _is_plain(text: str) -> bool:
    """Whether `text` without quotes is read back as the same text."""
    if text == "..." or not PLAIN_TEXT.fullmatch(text):  # three dots end a document
        return False
    node = compose(text, Loader=CoreLoader)
    return node is not None and node.tag == STR_TAG


def read_yaml(path: Path) -> Sourced:
    """Read a YAML file whose top level is a mapping; raises `UserError` with file and line if it is not one."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise UserError(
            f"config {path} does not exist; give the path of a YAML file, such as yaml/demo.yaml"
        ) from error
    except OSError as error:
        raise UserError(
            f"config {path} cannot be read ({error.strerror}); give the path of a YAML file, such as yaml/demo.yaml"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"config {path} is not UTF-8 text (byte {error.start}), expected a YAML file; save it as UTF-8"
        ) from error
    source = parse_yaml(text, str(path), lines=True)
    if not isinstance(source.data, dict):
        found = "nothing" if source.data is None else yaml_text(source.data)[:60]
        raise UserError(f"config {path} holds {found}, expected a mapping with keys such as name, frontend and backend")
    return source


def parse_yaml(text: str, where: str, *, lines: bool) -> Sourced:
    """Parse one YAML document; origins are `where:line` if `lines`, else `where`. Raises `UserError` if it is wrong."""
    try:
        node = compose(text, Loader=CoreLoader)
        entries = list(_walk(node, (), 1)) if node is not None else [((), None, 1)]
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = ", ".join(part for part in (error.context, error.problem) if part)
        raise _syntax_error(where, reason, mark.line + 1 if lines and mark else None) from error
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise _syntax_error(where, f"control character {text[error.position]!a}", line if lines else None) from error
    except RecursionError as error:
        raise _syntax_error(where, "lists or mappings nested too deeply", None) from error
    origins = {path: f"{where}:{line}" if lines and path else where for path, _, line in entries}
    return Sourced(entries[-1][1], origins)


def _syntax_error(where: str, reason: str, line: int | None) -> UserError:
    place = where if line is None else f"{where}:{line}"
    return UserError(f"{place}: {reason}; expected plain YAML, so correct it there")


def _walk(node: Node, path: KeyPath, line: int) -> Iterator[tuple[KeyPath, Value, int]]:
    """Yield (key path, value, line of its key) for everything below `node`, then for `node` itself."""
    if node.tag not in TAGS[type(node)]:
        raise MarkedYAMLError(problem=f"tag {node.tag} is not supported here", problem_mark=node.start_mark)
    value: Value
    if isinstance(node, MappingNode):
        value = {}
        for key, child, key_line in _unique_items(node):
            for entry in _walk(child, (*path, key), key_line):
                yield entry
            value[key] = entry[1]
    elif isinstance(node, SequenceNode):
        value = []
        for index, child in enumerate(node.value):
            for entry in _walk(child, (*path, index), child.start_mark.line + 1):
                yield entry
            value.append(entry[1])
    else:
        value = _scalar(node)
    yield path, value, line


def _unique_items(node: MappingNode) -> Iterator[tuple[str, Node, int]]:
    """Yield (key, value node, line) for a mapping; a key is text, whatever it looks like, and may occur only once."""
    seen: dict[str, int] = {}
    for key_node, child in node.value:
        if not isinstance(key_node, ScalarNode):
            raise MarkedYAMLError(
                problem="a key is a list or a mapping, expected text", problem_mark=key_node.start_mark
            )
        key, line = key_node.value, key_node.start_mark.line + 1
        if key in seen:
            problem = f"key {key!r} is given twice (first on line {seen[key]})"
            raise MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        seen[key] = line
        yield key, child, line


def _scalar(node: Node) -> Scalar:
    """The value of a scalar node; raises `MarkedYAMLError` for an unusable number."""
    text = node.value
    try:
        if node.tag in (INT_TAG, FLOAT_TAG) and len(text) > LONGEST_NUMBER:
            raise ValueError
        if node.tag == INT_TAG:
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        if node.tag == FLOAT_TAG:
            return float(text)
    except ValueError as error:
        raise MarkedYAMLError(problem=f"{text[:40]!r} is not a usable number", problem_mark=node.start_mark) from error
    if node.tag == BOOL_TAG:
        return str(text).lower() == "true"
    if node.tag == NULL_TAG:
        return None
    return str(text)


def with_override(source: Sourced, override: str) -> Sourced:
    """`source` with the value of one `key.path=value` in place of whatever was there; the value is one line of YAML."""
    where = f"--set {override}"
    key, equals, text = override.partition("=")
    path: tuple[str, ...] = tuple(key.strip().split("."))
    if not equals or not all(path) or len(path) > DEEPEST:
        raise UserError(
            f"{where} is not an override; expected --set key.path=value, such as --set shape.cache_len=2048"
        )
    given = parse_yaml(text, where, lines=False)
    parents: list[KeyPath] = [path[:depth] for depth in range(1, len(path))]
    for parent in parents:
        found = source.get(parent) if parent in source.origins else None
        if not isinstance(found, dict | None):
            raise UserError(
                f"{where}: {key_text(parent)} is {yaml_text(found)} ({source.origin(parent)}), so it has no keys to set"
            )
    kept = {old: origin for old, origin in source.origins.items() if old[: len(path)] != path}
    made = {parent: where for parent in parents if parent not in source.origins}
    new: dict[KeyPath, str] = {(*path, *below): where for below in given.origins}
    return Sourced(_replaced(source.data, path, given.data), {**kept, **made, **new})


def _replaced(data: Value, path: tuple[str, ...], value: Value) -> Value:
    """A copy of `data` with `value` at `path`; anything on the way that is not a mapping becomes one."""
    if not path:
        return value
    mapping = data if isinstance(data, dict) else {}
    return {**mapping, path[0]: _replaced(mapping.get(path[0]), path[1:], value)}
