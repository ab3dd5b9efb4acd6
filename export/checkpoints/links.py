"""Links in a checkpoint's folder: what they lead to goes into an artifact, so they must not lead to other files."""

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
