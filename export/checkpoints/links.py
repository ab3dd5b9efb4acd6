"""What is no plain file in a checkpoint's folder: links, which must not lead to other files, and devices and pipes."""

from pathlib import Path

from runtime.errors import UserError


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
