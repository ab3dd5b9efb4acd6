"""The signature of a manifest: none but its own may be accepted."""

import base64
from functools import partial
from pathlib import Path

from nacl.signing import SigningKey

from runtime.artifact.signing import PUBLIC_KEY, SIGNATURE, SIGNATURE_FILE, check_signature, line
from tests.fuzz.mutations import spoil_bytes
from tests.fuzz.reader import Reader, demand, place

MANIFEST = b"{}"


def open_reader(folder: Path) -> Reader:
    key = SigningKey(bytes(32))
    (folder / "public.key").write_text(line(PUBLIC_KEY, bytes(key.verify_key)))
    signed = key.sign(MANIFEST).signature
    known = {"an endless line": line(SIGNATURE, signed).encode().strip() * 10_000}
    return Reader([line(SIGNATURE, signed).encode()], spoil_bytes, partial(check, folder, signed), known)


def check(folder: Path, signed: bytes, data: bytes) -> None:
    place(folder / SIGNATURE_FILE, data)
    check_signature(folder, MANIFEST, folder / "public.key")
    demand(base64.b64decode(data.split()[1]) == signed, "another signature was accepted")
