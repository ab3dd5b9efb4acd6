"""What is no plain file in a checkpoint's folder: links, which must not lead to other files, devices, LFS pointers."""

from pathlib import Path

from runtime.errors import UserError

# What a pointer file begins with, and its most bytes: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
LFS_POINTER, LFS_POINTER_LIMIT = b"version https://git-lfs.github.com/spec/", 1024


def check_link(file: Path, folder: Path) -> None:
    """Raise `UserError` if a file of `folder` lies elsewhere.

    In a cache of a model hub, `snapshots/REVISION/` holds links to files in `blobs/` beside `snapshots/`.
    """
    place, root = file.resolve(), folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(place.is_relative_to(parent) for parent in allowed):
        raise UserError(
            f"{file} is a link to {place}, outside the checkpoint; copy the file there, since whatever a link leads to "
            "would go into the artifact"
        )


def check_regular(entry: Path) -> None:
    """Raise `UserError` for a device, a pipe, a socket, or a link that leads nowhere: it would count as absent."""
    if not entry.is_file() and not entry.is_dir():
        found = "a link that leads nowhere" if entry.is_symlink() else "neither a file nor a folder"
        raise UserError(f"{entry} is {found}; fetch the checkpoint again, or remove it")


def is_lfs_pointer(file: Path) -> bool:
    """Whether a file is the pointer that a clone without Git LFS has in the place of a large file."""
    if file.stat().st_size >= LFS_POINTER_LIMIT:
        return False
    with file.open("rb") as opened:
        return opened.read(len(LFS_POINTER)) == LFS_POINTER


def lfs_advice(file: Path) -> str:
    """What to tell the user about a pointer."""
    return (
        f"{file} is a Git LFS pointer of {file.stat().st_size} bytes, not the file itself; "
        f"run `git lfs pull` in {file.parent}, or fetch the file again"
    )
