"""How one artifact's folder takes the place of another: what may be replaced, and how it is done in one step.

The new contents lie in a sibling of the folder, on the same disk, and are renamed. A process that is killed leaves
siblings behind whose names tell what they are; the next one removes them.
"""

import errno
import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from runtime.artifact.consistency import (
    CHAT_TEMPLATE_FILE,
    LIBRARY_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILES,
    WEIGHTS_FILE,
)
from runtime.artifact.durable import sync
from runtime.artifact.golden import GOLDEN_FILE
from runtime.artifact.signing import SIGNATURE_FILE
from runtime.errors import UserError

_LEVEL_LIBRARY = re.compile(r"library\.[A-Za-z0-9._-]+\.so")
ARTIFACT_NAMES = frozenset(
    (
        MANIFEST_FILE,
        SIGNATURE_FILE,
        LIBRARY_FILE,
        WEIGHTS_FILE,
        GOLDEN_FILE,
        CHAT_TEMPLATE_FILE,
        *TOKENIZER_FILES.values(),
    )
)


class _AnyManifest(msgspec.Struct):
    """Keys that the manifest of every version has."""

    schema_version: int
    build_key: str
    files: list[Any]


def refuse_other_folder(folder: Path) -> None:
    """Raise `UserError` for what `write_artifact` would not replace: whatever is neither an artifact nor empty.

    A damaged artifact, or one of an earlier version, is one all the same: nothing but files with the names that an
    artifact has, and the library and weights among them or a manifest of ours.
    """
    if not os.path.lexists(folder):
        return
    strange = strange_entry(folder)
    if strange is not None:
        raise UserError(f"{folder} exists and is not an artifact ({strange}); move it, or choose another name")
    names = {entry.name for entry in os.scandir(folder)}
    if names and not {LIBRARY_FILE, WEIGHTS_FILE} <= names and not _is_ours(folder / MANIFEST_FILE):
        raise UserError(
            f"{folder} exists and is not an artifact (no {MANIFEST_FILE} says so); move it, or choose another name"
        )


def strange_entry(folder: Path) -> str | None:
    """What in a place is in no artifact, as a clause; None if there is nothing."""
    if folder.is_symlink() or not folder.is_dir():
        return "it is no folder"
    for entry in os.scandir(folder):
        known = entry.name in ARTIFACT_NAMES or _LEVEL_LIBRARY.fullmatch(entry.name)
        if not known or not entry.is_file(follow_symlinks=False):
            return f"it holds {entry.name!r}"
    return None


def _is_ours(manifest: Path) -> bool:
    """Whether a file is a manifest of any version."""
    try:
        msgspec.json.decode(manifest.read_bytes(), type=_AnyManifest)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


def sibling(folder: Path, kind: str) -> Path:
    """A path beside a folder that belongs to this process: `tmp` new contents, `old` ones, or a `manifest`."""
    return folder.with_name(f".{folder.name}.{os.getpid()}.{kind}")


def remove_stale(folder: Path) -> None:
    """Remove what a killed writer left; an old artifact that it moved aside is put back if nothing took its place."""
    for path in folder.parent.iterdir():
        match = re.fullmatch(rf"\.{re.escape(folder.name)}\.([0-9]{{1,9}})\.(tmp|old|manifest)", path.name)
        if not match or _runs_elsewhere(int(match[1])):
            continue
        if match[2] == "old" and not folder.exists():
            path.rename(folder)
        elif match[2] == "manifest":
            path.unlink(missing_ok=True)
        elif strange_entry(path) is None:
            shutil.rmtree(path, ignore_errors=True)


def _runs_elsewhere(pid: int) -> bool:
    """Whether `pid` is a live process other than this one (in a container, this one often has the old one's pid)."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def swap_in(fresh: Path, folder: Path) -> None:
    """Rename `fresh` to `folder`; the old contents are moved aside first and removed last, or put back on failure."""
    aside = sibling(folder, "old")
    while True:
        with suppress(FileNotFoundError):
            folder.rename(aside)
        try:
            fresh.rename(folder)
        except BaseException as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                # another run put its artifact there in between: replace that one
                shutil.rmtree(aside, ignore_errors=True)
                continue
            if aside.exists():
                aside.rename(folder)
            raise
        break
    sync(folder.parent)
    shutil.rmtree(aside, ignore_errors=True)
