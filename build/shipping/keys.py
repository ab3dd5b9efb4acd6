"""`python -m build.shipping.keys FOLDER`: make a new pair of keys for signing artifacts.

The private key stays here; the public key goes to the boxes.
"""

import argparse
import os
from pathlib import Path

from nacl.signing import SigningKey

from export.console import console
from runtime.artifact.consistency import MANIFEST_FILE
from runtime.artifact.durable import replaced_whole
from runtime.artifact.signing import PRIVATE_KEY, PUBLIC_KEY, SIGNATURE, SIGNATURE_FILE, line, read_line
from runtime.errors import UserError, run_command

PRIVATE_FILE, PUBLIC_FILE = "signing.key", "signing.pub"


def main() -> int:
    """Write both keys; returns the exit status."""
    parser = argparse.ArgumentParser(description="Make a pair of Ed25519 keys.")
    parser.add_argument("folder", type=Path, help=f"where to write {PRIVATE_FILE} and {PUBLIC_FILE}")
    private, public = make_keys(parser.parse_args().folder)
    console.print(f"{private}: signs artifacts (`make ship KEY={private}`); keep it secret")
    console.print(f"{public}: copy it to the boxes, by a different route than the artifacts")
    return 0


def make_keys(folder: Path) -> tuple[Path, Path]:
    """Write a new private key, readable only by its owner, and its public key; returns both files.

    Raises `UserError` rather than replace a key, and leaves neither file behind if one cannot be written.
    """
    private, public = folder / PRIVATE_FILE, folder / PUBLIC_FILE
    for path in (private, public):
        if os.path.lexists(path):
            raise UserError(
                f"{path} exists, and a key that was replaced is lost for good; "
                "choose another folder, or remove it first"
            )
    key = SigningKey.generate()
    texts = {private: line(PRIVATE_KEY, bytes(key)), public: line(PUBLIC_KEY, bytes(key.verify_key))}
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, mode in ((private, 0o600), (public, 0o644)):
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w") as file:
                written.append(path)
                file.write(texts[path])
    except OSError as error:
        for path in written:
            path.unlink()
        raise UserError(
            f"keys cannot be written to {folder}: {error.strerror} ({error.filename or folder}), expected a folder or "
            "a name for a new one; choose another with FOLDER=..."
        ) from error
    return private, public


def sign(folder: Path, private_key: Path) -> None:
    """Sign an artifact's manifest as it is now; raises `UserError` for a file that is not a private key."""
    signature = signature_line((folder / MANIFEST_FILE).read_bytes(), private_key)
    # Outside the folder, where a reader would find one file too many; if this is killed, `write_artifact` removes it.
    with replaced_whole(folder / SIGNATURE_FILE, folder.with_name(f".{folder.name}.{os.getpid()}.manifest")) as fresh:
        fresh.write_text(signature)


def signature_line(data: bytes, private_key: Path) -> str:
    """The text of a file that signs `data`; raises `UserError` for a file that is not a private key."""
    return line(SIGNATURE, SigningKey(read_line(private_key, PRIVATE_KEY)).sign(data).signature)


if __name__ == "__main__":
    run_command(main)
