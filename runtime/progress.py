"""A line on the terminal that counts the bytes of long work, with their rate."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """Yield a function, which any thread may call, that counts bytes in a line on standard error.

    Prints nothing if that is not a terminal.
    """
    done, began, counting = 0, time.monotonic(), threading.Lock()

    def advance(nbytes: int) -> None:
        nonlocal done
        with counting:
            done += nbytes
            if sys.stderr.isatty():
                rate = done / max(time.monotonic() - began, 1e-9)
                line = f"\r{what} {done / 1e9:6.2f} of {total / 1e9:.2f} GB, {rate / 1e6:,.0f} MB/s "
                print(line, end="", file=sys.stderr, flush=True)

    yield advance
    if sys.stderr.isatty():
        print(file=sys.stderr)
