"""Checks the header of a GGUF file before the package `gguf` reads it, since the package trusts every count and place.

A count is at most what the bytes left in the file allow, and every tensor has a place of its own. The format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from math import prod
from pathlib import Path

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by value type
STRING, ARRAY = 8, 9
LEAST_KEY, LEAST_TENSOR, LEAST_STRING, LEAST_ARRAY = 13, 32, 8, 12  # bytes that one takes in the header
MOST_DIMENSIONS = 4
GENERAL = b"general."  # how the keys begin that say what a file is; they come first
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = b"general.alignment", 32


class UnknownPackingError(ValueError):
    """A tensor is packed in a way that the package `gguf` has no name for."""


def check_header(path: Path) -> None:
    """Raise `ValueError` for a header that is cut short, holds an impossible count, or places tensors wrongly.

    It is an `UnknownPackingError` for a tensor of an unknown type.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        _Header(data).check()


def general_strings(path: Path) -> dict[str, str]:
    """The texts among the first keys of a header, those that begin with "general."; none of what is no GGUF."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Header(data).general_strings()
    except (ValueError, OSError):
        return {}


class _Header:
    """A position in the file that moves on as the header is read."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0

    def check(self) -> None:
        tensors, keys = self._counts()
        alignment = DEFAULT_ALIGNMENT
        for _ in range(keys):
            name, kind, start = self._string(), self._number("I"), self._at
            self._skip_value(kind)
            if name == ALIGNMENT_KEY and kind == 4:
                alignment = struct.unpack_from("<I", self._data, start)[0]
        self._check_count(tensors, LEAST_TENSOR, "tensors")
        places = sorted(self._place() for _ in range(tensors))
        if alignment < 1:
            raise ValueError(f"its alignment is {alignment}")
        self._check_places(places, self._at + -self._at % alignment)

    def general_strings(self) -> dict[str, str]:
        found = {}
        for _ in range(self._counts()[1]):
            name, kind, start = self._string(), self._number("I"), self._at
            if not name.startswith(GENERAL):
                break
            self._skip_value(kind)
            if kind == STRING:
                found[name.decode(errors="replace")] = self._data[start + 8 : self._at].decode(errors="replace")
        return found

    def _counts(self) -> tuple[int, int]:
        """The numbers of tensors and of keys."""
        if self._bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._number("I")
        if version & 0xFFFF == 0:
            raise ValueError("its byte order is not this machine's")
        if version not in VERSIONS:
            raise ValueError(f"it has version {version}, expected {' or '.join(map(str, VERSIONS))}")
        tensors, keys = self._number("Q"), self._number("Q")
        self._check_count(keys, LEAST_KEY, "keys")
        return tensors, keys

    def _skip_value(self, kind: int) -> None:
        if kind == STRING:
            self._string()
        elif kind == ARRAY:
            inner, count = self._number("I"), self._number("Q")
            self._check_count(count, {STRING: LEAST_STRING, ARRAY: LEAST_ARRAY}.get(inner, 1), "values in an array")
            if inner == ARRAY:
                raise ValueError("it has an array of arrays, which no model needs")
            if inner == STRING:
                for _ in range(count):
                    self._string()
            else:
                self._bytes(count * self._scalar(inner))
        else:
            self._bytes(self._scalar(kind))

    def _scalar(self, kind: int) -> int:
        if kind not in SCALAR_BYTES:
            raise ValueError(f"it has a value of the unknown type {kind}")
        return SCALAR_BYTES[kind]

    def _place(self) -> tuple[int, int, str]:
        """Where a tensor begins and ends, counted from the start of the data, and its name."""
        name = self._string().decode()
        dimensions = self._number("I")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            raise ValueError(f"{name} has {dimensions} dimensions, expected 1 to {MOST_DIMENSIONS}")
        shape = [self._number("Q") for _ in range(dimensions)]
        kind = self._number("I")
        if kind not in list(GGMLQuantizationType):
            raise UnknownPackingError(f"{name} has the unknown type {kind}")
        packing = GGMLQuantizationType(kind)
        begin = self._number("Q")
        block, nbytes = GGML_QUANT_SIZES[packing]
        if min(shape) < 1 or shape[0] % block:
            raise ValueError(f"{name} has the shape {shape}, expected rows of a multiple of {block} numbers")
        return begin, begin + prod(shape) // block * nbytes, name

    def _check_places(self, places: list[tuple[int, int, str]], data_start: int) -> None:
        before = 0
        for begin, end, name in places:
            if begin < before:
                raise ValueError(f"{name} begins at byte {begin} of the data and overlaps the tensor before it")
            if data_start + end > len(self._data):
                raise ValueError(
                    f"{name} ends at byte {data_start + end}, but the file has {len(self._data)}: it is truncated"
                )
            before = end

    def _check_count(self, count: int, least: int, what: str) -> None:
        left = len(self._data) - self._at
        if count > left // least:
            raise ValueError(f"its header has {count} {what}, more than the {left} bytes left in the file can hold")

    def _string(self) -> bytes:
        length = self._number("Q")
        self._check_count(length, 1, "bytes in a string")
        return self._bytes(length)

    def _number(self, code: str) -> int:
        number: int = struct.unpack(f"<{code}", self._bytes(struct.calcsize(f"<{code}")))[0]
        return number

    def _bytes(self, length: int) -> bytes:
        if self._at + length > len(self._data):
            raise ValueError(f"its header is cut short at byte {len(self._data)}")
        self._at += length
        return self._data[self._at - length : self._at]
