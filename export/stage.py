"""Stages on disk: each result lies in a folder named by a key of everything that it depends on, and appears there complete or not at all."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from filelock import FileLock, Timeout

KEY_LENGTH = 20  # hexadecimal digits: 80 bits
ROOT = Path(__file__).resolve().parent.parent


def stage_key(inputs: Mapping[str, object], packages: Iterable[str], tools: Iterable[str]) -> str:
    """Key of a stage: its inputs, the source code of our `packages` and the versions of the `tools` that it calls."""
    parts = {"inputs": inputs, "code": {name: _code_digest(name) for name in packages}, "tools": tool_versions(tools)}
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:KEY_LENGTH]


def tool_versions(names: Iterable[str]) -> dict[str, str]:
    """Installed versions by distribution name."""
    return {name: version(name) for name in sorted(names)}


def _code_digest(package: str) -> str:
    digest = hashlib.sha256()
    for path in sorted((ROOT / package).rglob("*.py")):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def stage_folder(workspace: Path, stage: str, key: str) -> Path:
    """Where a stage's result lies once it is complete."""
    return workspace / f"{stage}-{key}"


def run_stage(workspace: Path, stage: str, key: str, fill: Callable[[Path], None]) -> Path:
    """The stage's folder, made by `fill` in a temporary sibling unless it exists; results under other keys are removed."""
    folder = stage_folder(workspace, stage, key)
    if folder.is_dir():
        return folder
    for stale in workspace.glob(f"{stage}-*"):
        shutil.rmtree(stale)
    fresh = workspace / f"{stage}-{key}.tmp"
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
    """Hold the workspace, so that two compiles of one config follow each other; the second one says that it waits."""
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
