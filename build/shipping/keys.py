"""`python -m build.shipping.keys FOLDER`: make a new pair of keys for signing artifacts.

The private key stays here; the public key goes to the boxes.
"""

import argparse
import os
from pathlib import Path

from nacl.signing import SigningKey

from export.console import console
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

    Raises `UserError` rather than replace a key.
    """
    private, public = folder / PRIVATE_FILE, folder / PUBLIC_FILE
    for path in (private, public):
        if path.exists():
            raise UserError(
                f"{path} exists, and a key that was replaced is lost for good; "
                "choose another folder, or remove it first"
            )
    key = SigningKey.generate()
    folder.mkdir(parents=True, exist_ok=True)
    with os.fdopen(os.open(private, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(line(PRIVATE_KEY, bytes(key)))
    public.write_text(line(PUBLIC_KEY, bytes(key.verify_key)))
    return private, public


def sign(folder: Path, private_key: Path) -> None:
    """Sign an artifact's manifest as it is now; raises `UserError` for a file that is not a private key."""
    manifest = (folder / "manifest.json").read_bytes()
    signature = SigningKey(read_line(private_key, PRIVATE_KEY)).sign(manifest).signature
    # Outside the folder, where a reader would find one file too many.
    fresh = folder.with_name(f".{folder.name}.{SIGNATURE_FILE}")
    try:
        fresh.write_text(line(SIGNATURE, signature))
        fresh.replace(folder / SIGNATURE_FILE)
    finally:
        fresh.unlink(missing_ok=True)


if __name__ == "__main__":
    run_command(main)
