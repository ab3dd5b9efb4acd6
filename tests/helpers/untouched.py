"""Arrays whose memory the system gives only as it is read or written, and which parts of them were."""

import mmap
from math import prod

import numpy as np

MAP_NORESERVE = 0x4000  # of Linux; Python 3.11 has no name for it
PAGE_MAP, ENTRY, PRESENT = "/proc/self/pagemap", 8, 63  # proc_pid_pagemap(5): bytes of a page's entry, and one bit


def untouched_memory(shape, dtype):
    """Zeros that take no memory until they are written."""
    size = prod(shape) * np.dtype(dtype).itemsize
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    return np.frombuffer(pages, dtype).reshape(shape)


def touched_pages(array):
    """The numbers of the pages of such an array that were read or written."""
    with open(PAGE_MAP, "rb") as pages:
        pages.seek(array.ctypes.data // mmap.PAGESIZE * ENTRY)
        entries = np.frombuffer(pages.read(-(-array.nbytes // mmap.PAGESIZE) * ENTRY), np.uint64)
    return np.flatnonzero(entries >> np.uint64(PRESENT)).tolist()
