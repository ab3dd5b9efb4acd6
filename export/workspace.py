"""Results on disk: each lies in a folder that appears complete or not at all, with the sums of everything in it.

Every folder that is made here carries `contents.json`, which says that the project made it and what it must hold. Only
such folders are ever removed, and a result whose files differ from their sums is made again.
"""

import os
import re
import shutil
import stat
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import msgspec
from filelock import FileLock, Timeout

from export.console import console
from runtime.artifact.durable import sync, write_whole
from runtime.artifact.hashing import check_sums, file_entry
from runtime.artifact.manifest import FileEntry, Record
from runtime.errors import UserError

CONTENTS_FILE = "contents.json"
TAG_FILE = "CACHEDIR.TAG"  # marks a workspace; https://bford.info/cachedir, which backup tools know
OWNER = "# Results of `make compile`"  # what tells our tag from another program's
TAG = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    f"{OWNER}, which are made again if they are lost. Keep nothing else in this folder.\n"
)
NAME_OF_RESULT = re.compile(r".+-[0-9a-f]{20}(\.tmp)?")  # its last part is a key
HELD = "COMPILE_HOLDS_WORKSPACE"  # environment variable: the workspace that a parent process holds
NOTES = frozenset({"peak_memory"})  # measurements that later runs add to a result; they do not affect it


class Contents(Record, frozen=True):
    """What a folder, or one result inside it, must hold."""

    made_by: Literal["make compile"] = "make compile"
    files: tuple[FileEntry, ...] | None = None  # None until the result is complete


def stage_folder(workspace: Path, stage: str, key: str) -> Path:
    """The folder of a stage's result, once it is complete."""
    return workspace / f"{stage}-{key}"


def run_stage(workspace: Path, stage: str, key: str, fill: Callable[[Path], object]) -> Path:
    """The stage's folder, made by `fill` unless it is there and whole; making it removes results under other keys."""
    folder = stage_folder(workspace, stage, key)
    if is_whole(folder):
        return folder
    remove_stage(workspace, stage, folder)
    return _make_whole(folder, fill)


def growing_stage(workspace: Path, stage: str, key: str) -> Path:
    """A folder for results of a stage that appear one by one, each sealed by itself; removes those under other keys."""
    folder = stage_folder(workspace, stage, key)
    remove_stage(workspace, stage, folder)
    if not is_ours(folder):
        _clear(folder)
        folder.mkdir(parents=True)
        _write_contents(folder / CONTENTS_FILE, Contents())
    return folder


def remove_stage(workspace: Path, stage: str, current: Path | None = None) -> None:
    """Remove the results of a stage under all keys, or under all but the current one's."""
    for stale in workspace.glob(f"{stage}-*"):
        if stale != current and is_ours(stale):
            shutil.rmtree(stale)


def made_whole(folder: Path, fill: Callable[[Path], object]) -> Path:
    """The folder, made by `fill` unless it is there and whole.

    It is filled as a temporary sibling and then renamed, so it appears complete or not at all. Raises `UserError` if
    something that this project did not make is in its place.
    """
    return folder if is_whole(folder) else _make_whole(folder, fill)


def _make_whole(folder: Path, fill: Callable[[Path], object]) -> Path:
    fresh = folder.with_name(f"{folder.name}.tmp")
    for old in (folder, fresh):  # damaged, and left behind by a killed run
        _clear(old)
    fresh.mkdir(parents=True)
    try:
        _write_contents(fresh / CONTENTS_FILE, Contents())
        fill(fresh)
        made = [path for path in fresh.rglob("*") if path.is_file() and path.name not in {CONTENTS_FILE, *NOTES}]
        seal(fresh / CONTENTS_FILE, made)
        os.replace(fresh, folder)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    sync(folder.parent)
    return folder


def seal(contents: Path, files: Collection[Path]) -> None:
    """Flush files to disk and write their sums to `contents`, beside them."""
    entries = []
    for path in sorted(files):
        sync(path)
        name = path.relative_to(contents.parent).as_posix()
        entries.append(msgspec.structs.replace(file_entry(path), path=name))
    _write_contents(contents, Contents(files=tuple(entries)))


def is_whole(folder: Path, contents: str = CONTENTS_FILE) -> bool:
    """Whether a result in a folder of ours is complete and every file has its sum; says so if one has not."""
    found = _read_contents(folder, contents)
    if found is None or found.files is None:
        return False
    for entry in found.files:
        path = folder / entry.path
        if not _own_file(path) or path.stat().st_size != entry.size:
            return _damaged(path)
    try:
        check_sums(folder, found.files)
    except (UserError, OSError):
        return _damaged(folder)
    return True


def is_ours(folder: Path) -> bool:
    """Whether this project made the folder, as this user."""
    return _read_contents(folder, CONTENTS_FILE) is not None


@contextmanager
def locked(workspace: Path, announce: Callable[[str], None]) -> Iterator[None]:
    """Hold the workspace, so that two compiles of one config run one after the other; the second says that it waits.

    The stages that a compile starts in other processes do not wait for it. Raises `UserError` for a workspace that
    another user owns, or that holds what this project did not make.
    """
    claim(workspace)
    name = str(workspace.resolve())
    if os.environ.get(HELD) == name:
        yield
        return
    with _held(workspace / "lock", announce):
        before = os.environ.get(HELD)
        os.environ[HELD] = name
        try:
            yield
        finally:
            os.environ.pop(HELD)
            if before is not None:
                os.environ[HELD] = before


@contextmanager
def locked_stage(workspace: Path, stage: str, announce: Callable[[str], None]) -> Iterator[None]:
    """Hold a stage of a held workspace: the process of a compile that was killed may still be at work on it."""
    with _held(workspace / f"{stage}.lock", announce):
        yield


def claim(workspace: Path) -> None:
    """Make the workspace and mark it; raises `UserError` for a folder that is not, or not safely, this project's."""
    remedy = "set workspace.path to another folder"
    workspace.mkdir(parents=True, exist_ok=True)
    status, tag = workspace.stat(), workspace / TAG_FILE
    if status.st_uid != os.geteuid():
        raise UserError(f"the workspace {workspace} belongs to the user {status.st_uid}, expected this one; {remedy}")
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise UserError(f"any user can write to the workspace {workspace}; {remedy}, or run `chmod o-w {workspace}`")
    if tag.is_file() and OWNER in tag.read_text(errors="replace"):
        return
    others = sorted(path.name for path in workspace.iterdir() if path.name != "lock")
    if others:
        raise UserError(
            f"the workspace {workspace} holds {others[0]!r}, but no {TAG_FILE} of this project; "
            f"{remedy}, or remove what is there"
        )
    write_whole(tag, TAG.encode())


@contextmanager
def _held(path: Path, announce: Callable[[str], None]) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        announce(f"another run holds {path.parent}; waiting for it to end")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _write_contents(path: Path, contents: Contents) -> None:
    write_whole(path, msgspec.json.encode(contents))


def _read_contents(folder: Path, name: str) -> Contents | None:
    """What a folder of ours must hold; None for any other folder, and for none."""
    path = folder / name
    if folder.is_symlink() or not folder.is_dir() or folder.stat().st_uid != os.geteuid() or not _own_file(path):
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=Contents)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _own_file(path: Path) -> bool:
    """Whether a path is a regular file of this user."""
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()


def _damaged(path: Path) -> bool:
    console.print(f"{path} is damaged, and is made again", style="yellow", markup=False)
    return False


def _clear(folder: Path) -> None:
    """Remove a folder of ours, or one that is empty; raises `UserError` for anything else that is in the way.

    A folder with the name of a result and a damaged `contents.json` is ours as well.
    """
    if not os.path.lexists(folder):
        return
    damaged = not folder.is_symlink() and NAME_OF_RESULT.fullmatch(folder.name) and _own_file(folder / CONTENTS_FILE)
    if is_ours(folder) or damaged:
        shutil.rmtree(folder)
    elif folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        folder.rmdir()
    else:
        raise UserError(
            f"{folder} is in the way of a result, but this project did not make it; move it, or set workspace.path to "
            "another folder"
        )
