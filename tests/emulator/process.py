"""The emulated GPU in a process of its own, for tests.

A process loads TVM's CUDA library once, and with it the driver that it will have: in that of other tests, a stub that
has no device. A kernel that takes its process along is an error here and not the end of a test run.
"""

import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from tests.emulator.gpu import EmulatorError


class GpuProcess:
    """The process, in which `tests.emulator.server` runs; `folder` keeps what it compiles."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._start()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", "tests.emulator.server", str(self._folder), str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()

    def ask(self, request: str, *arguments: Any) -> Any:
        """The result of a function of `Server`.

        Raises `EmulatorError` with what the emulator found, or with what else went wrong there. Where the process
        has ended, another one takes its place, without the kernels that this one had.
        """
        self._connection.send((request, arguments))
        try:
            error, result = self._connection.recv()
        except EOFError:
            status = self._process.wait()
            self._start()
            raise EmulatorError(f"the emulator's process has ended with status {status}") from None
        if error:
            raise EmulatorError(error)
        return result

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.wait()
