"""A checkpoint pickled by torch; what is mapped must be what torch reads into memory, record by record."""

import io
import struct
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch

from tests.fuzz.limits import start_clock
from tests.fuzz.mutations import spoil_bytes
from tests.fuzz.reader import Reader, WrongResult, place
from tests.fuzz.tiny_files import MISTRAL, opened, tensors, write_mistral

NAME = "consolidated.00.pth"
BOMB = 200 * 2**20  # bytes that a record of zeros unpacks to
# Offsets and sizes of the numbers in a zip file's three kinds of headers, by their signature.
HEADERS = {
    b"PK\3\4": ((6, 2), (8, 2), (14, 4), (18, 4), (22, 4), (26, 2), (28, 2)),
    b"PK\1\2": ((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (32, 2), (42, 4)),
    b"PK\5\6": ((8, 2), (10, 2), (12, 4), (16, 4)),
}


def open_reader(folder: Path) -> Reader:
    checkpoint = write_mistral(folder / "checkpoint")
    torch.set_num_threads(1)  # a forked process has no other threads
    seeds = [saved("float32"), saved("bfloat16")]
    known = {
        "numbers are deflated": rewritten(seeds[0], deflated={"archive/data/0"}),
        "the pickle is deflated": rewritten(seeds[0], deflated={"archive/data.pkl"}),
        "a bomb": rewritten(seeds[0], {"archive/data/0": bytes(BOMB)}, deflated={"archive/data/0"}),
        "a deflated byte order": rewritten(seeds[0], deflated={"archive/byteorder"}),
        "two records in one place": overlapping(seeds[0]),
    }
    return Reader(seeds, spoil, partial(check, checkpoint), known)


def saved(dtype: str) -> bytes:
    file = io.BytesIO()
    held = {name: torch.from_numpy(array) for name, array in tensors(MISTRAL).items()}
    torch.save({name: tensor.to(getattr(torch, dtype)) for name, tensor in held.items()}, file)
    return file.getvalue()


def rewritten(data: bytes, contents: dict[str, bytes] | None = None, deflated: set[str] | None = None) -> bytes:
    """The archive with other contents of some records, and some of them deflated."""
    result = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            kind = zipfile.ZIP_DEFLATED if name in (deflated or ()) else zipfile.ZIP_STORED
            new.writestr(name, (contents or {}).get(name, old.read(name)), kind)
    return result.getvalue()


def overlapping(data: bytes) -> bytes:
    """The archive with two records of the directory that begin at the same place."""
    changed = bytearray(data)
    sizes = {at: struct.unpack_from("<H", data, at + 28)[0] for at in _headers(data, b"PK\1\2")}
    names = {data[at + 46 : at + 46 + size]: at for at, size in sizes.items()}
    first, second = names[b"archive/data/0"], names[b"archive/data/11"]
    changed[second + 42 : second + 46] = data[first + 42 : first + 46]
    return bytes(changed)


def _headers(data: bytes, signature: bytes) -> Iterator[int]:
    at = data.find(signature)
    while at >= 0:
        yield at
        at = data.find(signature, at + 1)


def spoil(draw: Random, data: bytes) -> bytes:
    """Change the archive's numbers, its pickle, which records are deflated, or any bytes."""
    kind = draw.random()
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        pickled = archive.read("archive/data.pkl")
    if kind < 0.3:
        return rewritten(data, {"archive/data.pkl": spoil_bytes(draw, pickled)})
    if kind < 0.5:
        name = draw.choice(names)
        contents = {name: draw.choice((b"", b"big", bytes(1000), zlib.compress(bytes(1000))))}
        return rewritten(data, contents, {draw.choice(names), name})
    fields = [
        (at + offset, size)
        for signature, numbers in HEADERS.items()
        for at in _headers(data, signature)
        for offset, size in numbers
    ]
    return spoil_bytes(draw, data, fields)


def check(checkpoint: Path, data: bytes) -> None:
    path = place(checkpoint / NAME, data)
    ours = opened(checkpoint, "mistral")
    start_clock()
    try:
        with warnings.catch_warnings(action="ignore"):
            theirs = torch.load(path, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:
        if "crc" in str(error).lower():  # sums are read with the numbers alone, which the mapping avoids
            return
        raise WrongResult("torch itself refuses the file") from error
    arrays = {name: tensor.contiguous().view(torch.uint8).numpy() for name, tensor in theirs.items()}
    for name, array in arrays.items():
        if not np.array_equal(np.ascontiguousarray(ours.source.read(name, slice(None))).view(np.uint8), array):
            raise WrongResult("a tensor has other numbers than torch reads into memory")
