"""A checkpoint's safetensors file; what is read must be what the package `safetensors` reads."""

import json
import struct
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, deserialize

from tests.fuzz.mutations import EXTREMES, set_number, spoil_bytes, spoil_json
from tests.fuzz.reader import Reader, WrongResult, demand, place
from tests.fuzz.tiny_files import opened, safetensors_bytes, write_huggingface

LENGTH = 8  # bytes of the header's length


def open_reader(folder: Path) -> Reader:
    checkpoint = write_huggingface(folder / "checkpoint")
    seed = safetensors_bytes()
    return Reader([seed], spoil, partial(check, checkpoint), known_of(seed))


def spoil(draw: Random, data: bytes) -> bytes:
    """Change the header's JSON, with its length corrected, or the length, or any bytes."""
    kind = draw.random()
    if kind < 0.2:
        return spoil_bytes(draw, data)
    if kind < 0.3:
        other_length = bytearray(data)
        set_number(other_length, 0, LENGTH, draw.choice((*EXTREMES, len(data), len(data) - LENGTH)))
        return bytes(other_length)
    size = struct.unpack_from("<Q", data)[0]
    header, rest = data[LENGTH : LENGTH + size], data[LENGTH + size :]
    changed = _spoil_places(draw, header) if draw.random() < 0.5 else spoil_json(draw, header)
    return joined(changed, rest)


def _spoil_places(draw: Random, header: bytes) -> bytes:
    """Let a tensor have another place, size or type."""
    entries = json.loads(header)
    name = draw.choice([name for name in entries if name != "__metadata__"])
    begin, end = entries[name]["data_offsets"]
    other = draw.choice(list(entries))
    changes: tuple[dict[str, Any], ...] = (
        {"data_offsets": [begin, draw.choice(EXTREMES)]},
        {"data_offsets": [end, begin]},
        {"data_offsets": [begin + 4, end + 4]},
        {"data_offsets": entries[other].get("data_offsets", [0, 0])},
        {"data_offsets": [float(begin), end]},
        {"shape": [draw.choice(EXTREMES), draw.choice(EXTREMES)]},
        {"shape": [2**32, 2**32, *entries[name]["shape"]]},
        {"shape": [0, 2**63], "data_offsets": [begin, begin]},
        {"shape": []},
        {"shape": entries[name]["shape"][::-1]},
        {"dtype": draw.choice(("F16", "BF16", "F64", "I8", "F8_E4M3", "BOOL", "U64", "F4", ""))},
    )
    entries[name] |= draw.choice(changes)
    return json.dumps(entries).encode()


def joined(header: bytes, data: bytes) -> bytes:
    """A file whose data begins at a multiple of 64, as an artifact's must."""
    header += b" " * (-(LENGTH + len(header)) % 64)
    return struct.pack("<Q", len(header)) + header + data


def reference(data: bytes) -> dict[str, NDArray[Any]]:
    """The tensors as the package reads them, as bytes."""
    try:
        read = deserialize(data)
    except SafetensorError as error:
        raise WrongResult("the package safetensors refuses the file") from error
    return {name: np.frombuffer(bytes(entry["data"]), np.uint8) for name, entry in read}


def check(checkpoint: Path, data: bytes) -> None:
    place(checkpoint / "model.safetensors", data)
    found = opened(checkpoint, "huggingface")
    theirs = reference(data)
    demand(set(found.source.tensors) == set(theirs), "other tensors than the package reads")
    opened(checkpoint, "huggingface", theirs)


def known_of(seed: bytes) -> dict[str, bytes]:
    size = struct.unpack_from("<Q", seed)[0]
    header, rest = json.loads(seed[LENGTH : LENGTH + size]), seed[LENGTH + size :]
    scalar = {"dtype": "F32", "shape": [], "data_offsets": [len(rest), len(rest) + 4]}
    return {
        "a number without dimensions": joined(json.dumps({**header, "x": scalar}).encode(), rest + bytes(4)),
        "a name that no terminal can show": joined(
            json.dumps({**header, "\ud800": {**scalar}}).encode(), rest + bytes(4)
        ),
    }
