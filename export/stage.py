"""Keys of results: a key names everything that a result depends on, the code that makes it among them."""

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

KEY_LENGTH = 20  # hexadecimal digits: 80 bits
ROOT = Path(__file__).resolve().parent.parent
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)  # what may have a docstring
PRESENTATION = frozenset({"export.console"})  # terminal output, which does not affect a stage's result


def stage_key(inputs: Mapping[str, object], module: str, tools: Iterable[str]) -> str:
    """Key of a stage: its inputs, the code of `module` and of all its project imports, and the versions of `tools`."""
    code = {
        name: _source(path).code_sum for name, path in sorted(our_modules(module).items()) if name not in PRESENTATION
    }
    parts = {"inputs": inputs, "code": code, "tools": tool_versions(tools)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:KEY_LENGTH]


def our_modules(module: str) -> dict[str, Path]:
    """The files, by module name, of `module` and of every project module that it imports, directly or indirectly."""
    found: dict[str, Path] = {}
    seen: set[str] = set()
    names = {module}
    while names:
        seen |= names
        paths = {name: ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in names}
        ours = {name: path for name, path in paths.items() if path.is_file()}
        found |= ours
        names = {imported for path in ours.values() for imported in _source(path).imports} - seen
    return found


@dataclass(frozen=True)
class _Source:
    """What the keys need of one source file."""

    imports: tuple[str, ...]
    code_sum: str  # SHA-256 of its syntax tree, so that comments, docstrings and formatting do not count


def _source(path: Path) -> _Source:
    """A source file, parsed once: a compile asks for a dozen keys, each of up to a hundred files."""
    return _parsed(path, path.stat().st_mtime_ns)


@cache
def _parsed(path: Path, _changed: int) -> _Source:
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return _Source(tuple(_imported(nodes)), hashlib.sha256(ast.dump(tree).encode()).hexdigest())


def _imported(nodes: Iterable[ast.AST]) -> Iterator[str]:
    """Names that may be modules: `import a.b` gives a.b; `from a import b` gives a and a.b."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tool_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name."""
    return {name: version(name) for name in sorted(names)}
