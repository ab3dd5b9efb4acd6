"""Whether processes have ended."""

import time
from collections.abc import Iterable
from pathlib import Path

SECONDS = 10  # a killed process ends soon, not at once


def assert_gone(pids: Iterable[int]) -> None:
    """Wait until the processes have ended."""
    end = time.monotonic() + SECONDS
    left = set(pids)
    assert left, "there is no process to wait for"
    while left := {pid for pid in left if _is_running(pid)}:
        assert time.monotonic() < end, f"{left} are still there"
        time.sleep(0.01)


def _is_running(pid: int) -> bool:
    """Whether a process exists; a zombie has ended, even if nobody has asked for its status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
