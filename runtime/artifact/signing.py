"""Ed25519 signing (RFC 8032, by libsodium): proof of who made an artifact.

The manifest is signed, and its sums cover every other byte. A key file and a signature file are one line of text: the
kind, and the bytes in base64. The public key must reach the box by a different route from the artifact: whoever can
replace one could otherwise replace both.
"""

import argparse
import base64
import os
from pathlib import Path

from runtime.errors import UserError

SIGNATURE_FILE = "manifest.sig"
KEY_VARIABLE = "RUNTIME_PUBLIC_KEY"  # environment variable: a public key's file, whose signature every command requires
PUBLIC_KEY = "ed25519-public-key"
PRIVATE_KEY = "ed25519-private-key"
SIGNATURE = "ed25519-signature"
SIZES = {PUBLIC_KEY: 32, PRIVATE_KEY: 32, SIGNATURE: 64}  # bytes
LINE_LIMIT = 200


def line(kind: str, data: bytes) -> str:
    """One key or signature as the text of its file."""
    return f"{kind} {base64.b64encode(data).decode()}\n"


def read_line(path: Path, kind: str) -> bytes:
    """Read the bytes of a key or signature; raises `UserError` for a file that is missing or holds anything else."""
    try:
        with path.open("rb") as file:
            text = file.read(LINE_LIMIT)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; expected one line, `{kind} ...`") from error
    found, _, encoded = text.decode("ascii", "replace").strip().partition(" ")
    try:
        data = base64.b64decode(encoded, validate=True)
    except ValueError:  # binascii.Error is one
        data = b""
    if found != kind or len(data) != SIZES[kind]:
        raise UserError(
            f"{path} holds no {kind}; expected one line, `{kind} ...`, as `make keys` and `make ship KEY=...` write it"
        )
    return data


def key_of_environment() -> Path | None:
    """The public key that this environment requires, if any; raises `UserError` if the variable is empty."""
    name = os.environ.get(KEY_VARIABLE)
    if name == "":
        raise UserError(
            f"{KEY_VARIABLE} is empty, expected a public key's file; set it, or unset it to check no signature"
        )
    return None if name is None else Path(name)


def add_public_key(parser: argparse.ArgumentParser) -> None:
    """Add the flag that names a public key, of commands that check a signature."""
    parser.add_argument(
        "--public-key",
        type=Path,
        metavar="FILE",
        help=f"public key of the required signer (default: ${KEY_VARIABLE}, if set)",
    )


def check_signature(folder: Path, manifest: bytes, public_key: Path) -> None:
    """Raise `UserError` unless `folder` holds a signature of `manifest` by the owner of `public_key`."""
    key = read_line(public_key, PUBLIC_KEY)
    path = folder / SIGNATURE_FILE
    if not path.is_file():
        raise UserError(
            f"{folder} is not signed, but a signature by {public_key} is required; "
            "ship it again with `make ship KEY=...`"
        )
    signature = read_line(path, SIGNATURE)
    try:
        from nacl.exceptions import BadSignatureError  # a box that requires no signature needs no PyNaCl
        from nacl.signing import VerifyKey
    except ImportError as error:
        raise UserError(
            f"the signature of {folder} cannot be checked: {error}; "
            "install the shipped packages again with ./install.sh"
        ) from error
    try:
        VerifyKey(key).verify(manifest, signature)
    except BadSignatureError as error:
        raise UserError(
            f"{folder} was changed after it was signed, or was signed by another key than {public_key}; "
            "do not use it, and get it again from its maker"
        ) from error
