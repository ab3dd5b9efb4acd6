"""How a kernel's loops become hardware: one body, built for a GPU's blocks and threads, or as serial loops that a CPU runs one by one.

A kernel is written in phases: inside a loop over blocks, one loop over threads for each phase. On a GPU TVM puts a barrier between two phases
that share memory; in serial order the end of the loop is that barrier. What a thread keeps from one phase to the next lies in a `private`
buffer: registers on a GPU, one entry a thread in the serial form, hence indexed through `own`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

WARP = 32  # threads that run together, and whose neighbouring loads become one
SHARED_BYTES = 48 * 1024  # that a block may have, on every architecture


@dataclass(frozen=True)
class Binding:
    """The two loops that a kernel is made of, and where its memory lies."""

    blocks: Callable[[int], Any]  # loop over n independent blocks; each top-level one is a launch of its own
    threads: Callable[[int], Any]  # loop over the threads of one block
    shared: str  # storage scope of what the threads of a block share
    private: str  # storage scope of what one thread keeps from phase to phase
    unroll: Callable[[int], Any]  # loop over what a thread keeps: written out on a GPU, so that it lies in registers
    serial: bool

    def copies(self, threads: int) -> int:
        """How many threads' private values one buffer holds."""
        return threads if self.serial else 1

    def own(self, thread: Any) -> Any:
        """Index of a thread's copy in a private buffer."""
        return thread if self.serial else 0


GPU = Binding(
    blocks=lambda n: T.thread_binding(n, thread="blockIdx.x"),
    threads=lambda n: T.thread_binding(n, thread="threadIdx.x"),
    shared="shared",
    private="local",
    unroll=T.unroll,
    serial=False,
)
SERIAL = Binding(blocks=T.serial, threads=T.serial, shared="global", private="global", unroll=T.serial, serial=True)
ATTRIBUTES = {  # of every kernel: no fusion into it, and no automatic schedule
    "tirx.noalias": True,
    "op_pattern": 8,
    "tirx.is_scheduled": True,
}
