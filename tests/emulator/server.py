"""What a process with the emulated GPU does for another one: `python -m tests.emulator.server FOLDER CONNECTION`."""

import sys
import traceback
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from runtime.engines.tvm_runtime import import_ffi
from tests.emulator.gpu import EmulatorError, Run
from tests.emulator.kernels import Array, EmulatedKernels, Kernel


class Server:
    """The functions that the other process may call, by their names."""

    def __init__(self, kernels: EmulatedKernels) -> None:
        self._kernels, self._compiled = kernels, list[Kernel]()

    def compile(self, function: str) -> int:
        """The number of a new kernel."""
        self._compiled.append(self._kernels.compiled(import_ffi().serialization.from_json_graph_str(function)))
        return len(self._compiled) - 1

    def run(self, kernel: int, arrays: Sequence[Array], runs: Sequence[Run]) -> list[Array]:
        """`EmulatedKernels.run_each` of a kernel by its number."""
        return self._kernels.run_each(self._compiled[kernel], arrays, runs)

    def launch(
        self, source: str, blocks: int, cluster: int, threads: int, arrays: Sequence[Array], run: Run
    ) -> list[Array]:
        """`EmulatedKernels.launch`."""
        return self._kernels.launch(source, blocks, cluster, threads, arrays, run)

    def serve(self, connection: Connection) -> None:
        """Answer with an error, if there was one, and a result, until the other side is closed."""
        while True:
            try:
                request, arguments = connection.recv()
            except EOFError:
                return
            try:
                connection.send((None, getattr(self, request)(*arguments)))
            except EmulatorError as error:
                connection.send((str(error), None))
            except Exception:
                connection.send((traceback.format_exc(), None))


if __name__ == "__main__":
    Server(EmulatedKernels.load(Path(sys.argv[1]))).serve(Connection(int(sys.argv[2])))
