"""The emulated GPU in a process of its own.

A process loads TVM's CUDA library once, and with it the driver that it will have: in that of other tests, a stub that
has no device. A kernel that takes its process along is an error here and not the end of a test run.
"""

import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from build.kernels.cuda.binding import GPU
from runtime.engines.tvm_runtime import import_ffi
from tests.emulator.gpu import EmulatorError, Run
from tests.emulator.kernels import Array, EmulatedKernels, Kernel

# TVM's own functions for it also look for old versions of what they load, which takes longer than a kernel's compile.
JSON = import_ffi().serialization


class GpuProcess:
    """The process, from outside. Each call of a kernel is one for each of `runs`, which must give the same bits."""

    def __init__(self, folder: Path, runs: Sequence[Run]) -> None:
        self._runs = tuple(runs)
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", __name__, str(folder), str(theirs.fileno())]
        self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()

    def compiled(self, maker: Callable[..., Any], *arguments: Any, **options: Any) -> int:
        """The number of a kernel, of the function that `maker` returns for a GPU."""
        return self._ask("compile", JSON.to_json_graph_str(maker(*arguments, on=GPU, **options)))

    def run(self, kernel: int, *arrays: Array) -> list[Array]:
        """Call a kernel; return the arrays as it left them. Raises `EmulatorError` with what was found."""
        return self._ask("run", kernel, arrays, self._runs)

    def _ask(self, *request: Any) -> Any:
        self._connection.send(request)
        try:
            found, answer = self._connection.recv()
        except EOFError:
            raise EmulatorError(f"the emulator's process has ended with status {self._process.wait()}") from None
        if found:
            raise EmulatorError(found)
        return answer

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.wait()


def serve(kernels: EmulatedKernels, connection: Connection) -> None:
    """Answer requests with what went wrong, if anything did, and a result, until the other side is closed."""
    compiled: list[Kernel] = []
    while True:
        try:
            request, *arguments = connection.recv()
        except EOFError:
            return
        try:
            if request == "compile":
                compiled.append(kernels.compiled(JSON.from_json_graph_str(*arguments)))
                answer = len(compiled) - 1
            else:
                kernel, arrays, runs = arguments
                answer = kernels.run_each(compiled[kernel], arrays, runs)
            connection.send((None, answer))
        except EmulatorError as error:
            connection.send((str(error), None))
        except Exception:
            connection.send((traceback.format_exc(), None))


if __name__ == "__main__":
    serve(EmulatedKernels.load(Path(sys.argv[1])), Connection(int(sys.argv[2])))
