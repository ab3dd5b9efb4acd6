"""The device code in a compiled library, read from its bytes; nothing is loaded or run.

A fatbin is a header (magic, version, header size, size of all entries) and entries, each a header and a payload.
Offsets in an entry's header: 0 kind (2 bytes: 1 PTX, 2 machine code), 4 header size (4), 8 payload size (8), 28
architecture (4), 40 flags (8), little endian. The format is not publicly documented;
`tests/build_stage/tvm_stage/test_cuda.py` checks this reading against nvcc's output.
"""

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.errors import UserError

MAGIC = struct.pack("<IH", 0xBA55ED50, 1)
HEADER = struct.Struct("<IHHQ")  # magic, version, header size, size of the entries
ENTRY = struct.Struct("<HHIQ12xI8xQ")  # kind, version, header size, payload size, architecture, flags
KINDS: dict[int, Literal["ptx", "cubin"]] = {1: "ptx", 2: "cubin"}
ARCH_SPECIFIC = 1 << 20  # flag of code for sm_90a and the like
SOURCE_MARKS = (b"__global__", b".visible .entry")  # they mark a kernel in CUDA source and in PTX


@dataclass(frozen=True)
class DeviceCode:
    """One entry of a fatbin."""

    kind: Literal["cubin", "ptx"]
    arch: str  # such as sm_90a
    code: bytes


def device_code(library: Path) -> list[list[DeviceCode]]:
    """The entries of each fatbin in a library."""
    data = library.read_bytes()
    modules, start = [], data.find(MAGIC)
    while start >= 0:
        _, _, header_size, size = HEADER.unpack_from(data, start)
        begin, end = start + header_size, start + header_size + size
        if end > len(data):
            raise UserError(f"{library}: the device code at byte {start} is cut off; compile again")
        modules.append(list(_entries(data[begin:end])))
        start = data.find(MAGIC, end)
    return modules


def _entries(data: bytes) -> Iterator[DeviceCode]:
    offset = 0
    while offset + ENTRY.size <= len(data):
        kind, _, header_size, size, arch, flags = ENTRY.unpack_from(data, offset)
        if kind in KINDS:  # other kinds hold compiler options
            code = data[offset + header_size : offset + header_size + size]
            yield DeviceCode(KINDS[kind], f"sm_{arch}{'a' if flags & ARCH_SPECIFIC else ''}", code)
        offset += header_size + size


def check_machine_code(library: Path, archs: Sequence[str]) -> None:
    """Raise `UserError` unless every fatbin of the library holds machine code for exactly `archs`.

    The library must contain neither PTX nor source.
    """
    marks = [mark.decode() for mark in SOURCE_MARKS if mark in library.read_bytes()]
    modules = device_code(library)
    if marks or any(code.kind == "ptx" for module in modules for code in module):
        raise UserError(
            f"{library} holds device code as text ({', '.join(marks) or 'PTX'}), expected machine code only; "
            "compile with `python -m build`"
        )
    if not modules:
        raise UserError(
            f"{library} holds no device code, expected machine code for {', '.join(archs)}; "
            "compile with backend.target: cuda"
        )
    for module in modules:
        found = [code.arch for code in module]
        if sorted(found) != sorted(archs):
            raise UserError(
                f"{library} holds machine code for {', '.join(found) or 'nothing'}, expected {', '.join(archs)}; "
                "compile again"
            )
