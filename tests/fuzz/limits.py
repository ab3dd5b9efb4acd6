"""The limits of one case: a process that exceeds its time is ended by the kernel, whatever code it is in."""

import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

CPU_SECONDS = 2.0
WALL_SECONDS = 20.0  # the machine may be busy with other things
MEMORY = 512 * 2**20  # bytes of address space beyond what the process has before its first case


def limit_memory() -> None:
    """Limit this process, from what it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def start_clock() -> None:
    """Give the process its time again: for another case, or for the software that a case is compared with."""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)


def stop_clock() -> None:
    """Lift the limits of time."""
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)


def apart(write: Callable[[], str]) -> str | None:
    """What other software writes, in a process with a time of its own; None if it fails in whatever way."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            start_clock()
            with os.fdopen(write_end, "w", encoding="utf-8", newline="") as file:
                file.write(write())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(write_end)
    with os.fdopen(read_end, encoding="utf-8", errors="replace", newline="") as file:
        text = file.read()
    return text if os.waitpid(pid, 0)[1] == 0 else None
