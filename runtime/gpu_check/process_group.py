"""A command in a process group of its own, which has a time limit and leaves nothing behind.

`run_group` starts a supervisor, which is this file as a script, and keeps its standard input open. The supervisor
starts the command and, when that ends or its own standard input is closed, kills all of the command's group. The input
is closed when `run_group` is left by an exception, and when the process that called it ends in any way, even by
SIGKILL.
"""

import math
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

SENTENCE = "error: "  # begins what `runtime.errors.run_command` says of a failure
KILL_SECONDS = 10  # in which a process ends that was killed; one that waits for a driver may take longer


class UnfinishedError(Exception):
    """A command did not end with status 0; says what became of it, if possible in its own words."""


class OutOfTimeError(Exception):
    """The time for a command was over before it ended."""


def run_group(
    command: Sequence[str], told: Callable[[str], None], *, seconds: float, silence: float = math.inf
) -> None:
    """Run a command to its end and hand `told` each line that it writes to standard output or standard error.

    Raises `OutOfTimeError` after `seconds`, and `UnfinishedError` if it fails or writes no line for `silence` seconds.
    """
    end = time.monotonic() + seconds
    last = ""

    def heard(line: str) -> None:
        nonlocal last
        if line.strip() and not line.startswith("{"):  # JSON says nothing about a failure
            last = line.strip()
        told(line)

    supervisor = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, *command],  # it needs the standard library alone
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C in a terminal is not for the supervisor
    )
    assert supervisor.stdin is not None
    assert supervisor.stdout is not None
    try:
        _read_lines(supervisor.stdout.fileno(), heard, end, silence)
        status = supervisor.wait()
    finally:
        supervisor.stdin.close()
        supervisor.stdout.close()
        with suppress(subprocess.TimeoutExpired):
            supervisor.wait(KILL_SECONDS)
    if status:
        raise UnfinishedError(_reason(status, last))


def _reason(status: int, last: str) -> str:
    """Why a command ended with a status, by the last line that it wrote."""
    if last.startswith(SENTENCE):
        return last.removeprefix(SENTENCE)
    return f"it ended with status {status}{': ' if last else ''}{last}"


def _read_lines(descriptor: int, told: Callable[[str], None], end: float, silence: float) -> None:
    """Read to the end of a pipe; raises as `run_group` does."""
    unfinished = b""
    while True:
        left = end - time.monotonic()
        if left <= 0:
            raise OutOfTimeError
        if not select.select([descriptor], [], [], min(left, silence))[0]:
            if left <= silence:
                raise OutOfTimeError
            raise UnfinishedError(f"it said nothing for {silence:g} s")
        data = os.read(descriptor, 2**16)
        if not data:
            if unfinished:
                told(unfinished.decode(errors="replace"))
            return
        *lines, unfinished = (unfinished + data).split(b"\n")
        for line in lines:
            told(line.decode(errors="replace"))


def main() -> int:
    """Run the command of the command line to the end of it or of standard input, and then kill its group."""
    command = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL, start_new_session=True)

    def end_with_input() -> None:
        os.read(sys.stdin.fileno(), 1)
        os.killpg(command.pid, signal.SIGKILL)

    threading.Thread(target=end_with_input, daemon=True).start()
    # waits without reaping: until then, no other group can have this number
    os.waitid(os.P_PID, command.pid, os.WEXITED | os.WNOWAIT)
    os.killpg(command.pid, signal.SIGKILL)
    status = command.wait()
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main())
