"""Memory of a stage's process: its peak is recorded beside the result, and freed blocks are returned at once."""

import ctypes
import gc
from pathlib import Path

from runtime.process_memory import peak_memory

PEAK_FILE = "peak_memory"  # in a stage's folder: bytes, as text
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
LARGEST_IN_HEAP = 2**20  # bytes
NEW_OBJECTS = 10_000  # after which Python looks for garbage; its default is 700


def return_freed_blocks() -> None:
    """Make malloc return every block of 1 MiB or more to the system when it is freed.

    By default, malloc raises that limit to as much as 32 MiB, following the sizes that it sees freed, and keeps up to
    twice as much: measured, 50 MB of a peak of 560 MB, depending on the order of the tensors. With a C library other
    than glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)


def collect_rarely() -> None:
    """Make Python look less often for objects that are reachable only from each other.

    Tracing and making kernels leave few of them, and hold a million others to look through: measured on a tiny model, a
    tenth of a compile's time for 1 MB of 455 MB. Arrays are freed as soon as nothing refers to them, as always.
    """
    gc.set_threshold(NEW_OBJECTS)


def note_peak(folder: Path) -> None:
    """Record this process's peak beside a result; if several processes made the result, the largest peak counts."""
    (folder / PEAK_FILE).write_text(f"{max(peak_memory(), noted_peak(folder) or 0)}\n")


def noted_peak(folder: Path) -> int | None:
    """The recorded peak of the process that made a stage's result, or None."""
    path = folder / PEAK_FILE
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdecimal() else None  # a run that was cut short may have left less than a number
