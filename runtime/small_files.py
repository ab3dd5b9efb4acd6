"""Small files that a person names: read whole, up to a size beyond which they cannot be what they should be."""

from pathlib import Path

from runtime.errors import UserError


def read_small(path: Path, most: int, what: str) -> bytes:
    """The bytes of a file, which is to be `what`, such as "a TOML file of settings".

    Raises `UserError` for one of more than `most` bytes, and one that cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; name {what}") from error
    if len(data) > most:
        raise UserError(f"{path} has more than {most} bytes, expected {what}")
    return data
