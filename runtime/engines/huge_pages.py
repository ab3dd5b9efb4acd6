"""Weights in huge pages: a copy in this process's memory, if the environment asks for one, in place of the mapped file.

A mapped file lies in pages of the size in which Linux happens to keep it, often 4 kB. Finding the place of each costs
time when a step reads all weights once, so a step is faster from pages of 2 MB. The copy is not shared with other
processes, and takes time when an artifact is loaded.
"""

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UserError

VARIABLE = "RUNTIME_HUGE_PAGES"
HUGE_PAGE = 2**21  # bytes; of x86-64


def wants_huge_pages() -> bool:
    """Whether RUNTIME_HUGE_PAGES is 1; raises `UserError` if it is neither 1, 0 nor empty."""
    text = os.environ.get(VARIABLE, "")
    if text not in ("", "0", "1"):
        raise UserError(
            f"{VARIABLE} is {text!r}, expected 1 for weights in huge pages, or 0; set one of these, or unset it"
        )
    return text == "1"


def in_huge_pages(path: Path) -> NDArray[Any]:
    """The bytes of a file as uint8, from a multiple of HUGE_PAGE on, in huge pages as far as Linux has them left.

    Raises `UserError` if the file is shorter than it was.
    """
    nbytes = path.stat().st_size
    pages = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    pages.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(pages, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE
    copy = memory[start : start + nbytes]
    with path.open("rb", buffering=0) as file:
        filled = 0
        while filled < nbytes and (read := file.readinto(copy.data[filled:])):
            filled += read
    if filled < nbytes:
        raise UserError(f"{path} has shrunk since it was opened: expected {nbytes} bytes, but {filled} are left")
    return copy
