"""What a stage's process takes of the machine's memory: its peak, kept beside the stage's result, and freed blocks given back at once."""

import ctypes
from pathlib import Path

from runtime.process_memory import peak_memory

PEAK_FILE = "peak_memory"  # in a stage's folder: bytes, as text
M_MMAP_THRESHOLD = -3  # of glibc's mallopt
LARGEST_IN_HEAP = 2**20  # bytes


def return_freed_blocks() -> None:
    """Let malloc give every block of 1 MiB or more back to the system when it is freed.

    By itself it raises that limit to as much as 32 MiB with the sizes that it sees freed, and keeps up to twice as much: measured, 50 MB of a
    peak of 560 MB, depending on the order of the tensors. With another C library than glibc, nothing changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP)


def note_peak(folder: Path) -> None:
    """Keep this process's peak beside a result; of several processes that made it, the largest."""
    (folder / PEAK_FILE).write_text(f"{max(peak_memory(), noted_peak(folder) or 0)}\n")


def noted_peak(folder: Path) -> int | None:
    """The peak of the process that made a stage's result; None where none was noted."""
    path = folder / PEAK_FILE
    return int(path.read_text()) if path.is_file() else None
