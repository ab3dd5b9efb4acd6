"""How a kernel's loops map to hardware: one body, built for a GPU's blocks and threads or as serial loops for a CPU.

A kernel is written in phases: inside a loop over blocks, there is one loop over threads per phase. On a GPU, TVM puts
a barrier between two phases that share memory; in the serial form, the end of the loop is that barrier. Data that a
thread keeps from one phase to the next is in a `private` buffer: registers on a GPU, one entry per thread in the
serial form, hence indexed through `own`. Kernels whose threads do not all do the same (`warpgroups/`) have no serial
form.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script import tirx as T

WARP = 32  # threads that run together, and whose loads of adjacent addresses become one
SHARED_BYTES = 48 * 1024  # of shared memory, that a block may use on every architecture
LARGE_SHARED_BYTES = 99 * 1024  # likewise, where the launch asks for it
LARGEST_SHARED_BYTES = 227 * 1024  # likewise, from sm_90 on
MULTIPROCESSORS = 132  # of an H200, for which work is cut into blocks


@dataclass(frozen=True)
class Binding:
    """The two loops of a kernel, and the storage scopes of its memory."""

    blocks: Callable[[int], Any]  # loop over n independent blocks; each top-level one is a launch of its own
    threads: Callable[[int], Any]  # loop over the threads of one block
    shared: str  # storage scope of data that the threads of a block share
    large_shared: str  # the same for more of it than SHARED_BYTES
    private: str  # storage scope of data that one thread keeps from phase to phase
    unroll: Callable[[int], Any]  # loop over data that a thread keeps: unrolled on a GPU, so that it stays in registers
    serial: bool

    def copies(self, threads: int) -> int:
        """Number of threads whose private values one buffer holds."""
        return threads if self.serial else 1

    def own(self, thread: Any) -> Any:
        """Index of a thread's copy in a private buffer."""
        return thread if self.serial else 0


GPU = Binding(
    blocks=lambda n: T.thread_binding(n, thread="blockIdx.x"),
    threads=lambda n: T.thread_binding(n, thread="threadIdx.x"),
    shared="shared",
    large_shared="shared.dyn",
    private="local",
    unroll=T.unroll,
    serial=False,
)
SERIAL = Binding(
    blocks=T.serial,
    threads=T.serial,
    shared="global",
    large_shared="global",
    private="global",
    unroll=T.serial,
    serial=True,
)
# Of every kernel: TVM fuses nothing into it and does not schedule it.
ATTRIBUTES = {"tirx.noalias": True, "op_pattern": 8, "tirx.is_scheduled": True}
