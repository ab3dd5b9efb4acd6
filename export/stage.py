"""Stages on disk: each result lies in a folder named after a key of everything that it depends on.

The folder appears complete or not at all.
"""

import ast
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

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
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
        if name not in found and path.is_file():
            found[name] = path
            waiting += _source(path).imports
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
    documented = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    for node in documented:
        if ast.get_docstring(node, clean=False) is not None:
            del node.body[0]
    return _Source(tuple(_imported(tree)), hashlib.sha256(ast.dump(tree).encode()).hexdigest())


def _imported(tree: ast.AST) -> Iterator[str]:
    """Names that may be modules: `import a.b` gives a.b; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def tool_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name."""
    return {name: version(name) for name in sorted(names)}


def stage_folder(workspace: Path, stage: str, key: str) -> Path:
    """The folder of a stage's result, once it is complete."""
    return workspace / f"{stage}-{key}"


def run_stage(workspace: Path, stage: str, key: str, fill: Callable[[Path], object]) -> Path:
    """The stage's folder, made by `fill` unless it exists; making it removes results under other keys."""
    folder = stage_folder(workspace, stage, key)
    if folder.is_dir():
        return folder
    for stale in workspace.glob(f"{stage}-*"):
        shutil.rmtree(stale)
    return made_whole(folder, fill)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, which takes no space; copy it if the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def made_whole(folder: Path, fill: Callable[[Path], object]) -> Path:
    """The folder, made by `fill` unless it exists: in a temporary sibling, so it appears complete or not at all."""
    if folder.is_dir():
        return folder
    fresh = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)  # left behind by a killed run
    fresh.mkdir(parents=True)
    try:
        fill(fresh)
        os.replace(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return folder


@contextmanager
def locked(workspace: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Hold the workspace, so that two compiles of one config run one after the other; the second says that it waits."""
    workspace.mkdir(parents=True, exist_ok=True)
    lock = FileLock(workspace / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        announce(f"another run holds {workspace}; waiting for it to end")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
