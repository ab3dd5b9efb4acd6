"""An artifact on a CUDA device: weights and caches lie there, ids and positions are copied there, and a call is one captured graph.

Loading ends with one run of each function on padding, which touches no cache but loads kernels and makes the workspace that will be needed. The
next call of a function records its launches without running them, and from then on a call is a launch of that graph, which reads ids, positions,
caches and weights from where they were. Outputs come back into pinned memory, and nothing else is waited for.

One model a process: TVM's workspace for what a kernel keeps between its launches is shared, and a page of it is freed where a larger one is asked
for. A second model with larger decode attention would free what the first one's graphs point to.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact import Artifact
from runtime.cuda_driver import Device as DriverDevice
from runtime.cuda_driver import check_driver, read_driver
from runtime.cuda_memory import CudaMemory
from runtime.errors import UserError
from runtime.loaded import PADDING_ID, SMALLER, Loaded, device_bytes
from runtime.manifest import CALL_INPUTS, Graph, Manifest, TensorSpec, WeightSpec
from runtime.tensor_file import numpy_dtype
from runtime.tvm_runtime import CPU_DEVICE, CUDA_DEVICE, CUDA_LIBRARIES, find_library, load_runtime, open_library


@dataclass(frozen=True)
class Device:
    """The first GPU of this machine: TVM's runtime with its CUDA part, and one stream with its memory."""

    description: DriverDevice
    ffi: Any
    memory: CudaMemory

    @classmethod
    def open(cls, archs: Sequence[str], threads: int) -> "Device":
        """Load the libraries; raises `UserError` when there is no driver, or no device that machine code for `archs` runs on."""
        description = check_driver(read_driver(), archs)
        cudart = ctypes.CDLL(str(find_library(CUDA_LIBRARIES[0])), ctypes.RTLD_GLOBAL)
        ffi = load_runtime(threads)
        ctypes.CDLL(str(find_library(CUDA_LIBRARIES[1])), ctypes.RTLD_GLOBAL)
        return cls(description, ffi, CudaMemory(cudart))

    def tensor(self, spec: WeightSpec | TensorSpec) -> Any:  # noqa: ANN401 (TVM's objects)
        """A new tensor on the device, of whatever its memory holds."""
        allocate = self.ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        return allocate(self.ffi.Shape(spec.shape), self.ffi.dtype(str(numpy_dtype(spec.dtype))), self.ffi.device("cuda", 0), None)

    def on_stream(self) -> Any:  # noqa: ANN401
        """A context in which what TVM's functions launch goes to the stream."""
        return self.ffi.use_raw_stream(self.ffi.device("cuda", 0), self.memory.stream)


def load(opened: Artifact, threads: int) -> Loaded:
    """Bring an artifact onto the first device; raises `UserError` when there is no driver, no fitting device or too little memory."""
    return load_library(Device.open(opened.manifest.target.arch, threads), opened.manifest, opened.library, opened.weights())


def load_library(device: Device, manifest: Manifest, library: Path, arrays: Mapping[str, NDArray[Any]]) -> Loaded:
    """Bring a compiled library and weights by name onto a device; raises `UserError` when they do not fit its free memory."""
    check_memory(device_bytes(manifest), device.memory.free_bytes())
    machine = open_library(device.ffi, library, CUDA_DEVICE, CPU_DEVICE)
    weights = [device.tensor(spec) for spec in manifest.weights]
    with progress("loading weights", sum(array.nbytes for array in arrays.values())) as advance:
        device.memory.upload(((tensor.data_ptr(), arrays[spec.name]) for tensor, spec in zip(weights, manifest.weights, strict=True)), advance)
    device.memory.drop_stages()  # nothing as large follows
    caches = [device.tensor(spec) for spec in manifest.graphs[-1].signature.caches]
    inputs, functions = {}, {}
    for graph in manifest.graphs:
        inputs[graph.tokens], functions[graph.tokens] = _function(device, machine[graph.name], graph, [*caches, *weights])
    for tokens, (ids, positions) in inputs.items():
        ids[...] = PADDING_ID
        positions[...] = np.arange(-tokens, 0)
        functions[tokens]()
    return Loaded(inputs, functions, caches)


def check_memory(needed: int, free: int) -> None:
    """Raise `UserError` unless `needed` bytes fit into the `free` ones of a device."""
    if needed > free:
        raise UserError(
            f"the GPU has {free / 1e9:,.1f} GB free, but weights, caches and workspace take {needed / 1e9:,.1f} GB; end what else runs there, "
            f"or {SMALLER}"
        )


def _function(
    device: Device,
    function: Callable[..., Any],
    graph: Graph,
    rest: list[Any],
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], Callable[[], NDArray[np.float32]]]:
    """Pinned ids and positions, and a call of one compiled function on them, which becomes a launch of a graph."""
    specs = graph.signature.inputs[:CALL_INPUTS]
    memory = device.memory
    host = [memory.pinned(spec.shape, np.int64) for spec in specs]
    copies = [device.tensor(spec) for spec in specs]
    outputs = memory.pinned(graph.signature.outputs[0].shape, np.float32)
    ran: list[Any] = []  # the output of a plain run; then of the captured one, which must stay where it is
    captured: list[ctypes.c_void_p] = []

    def run() -> Any:  # noqa: ANN401
        with device.on_stream():
            return function(*copies, *rest)

    def call() -> NDArray[np.float32]:
        for array, tensor in zip(host, copies, strict=True):
            memory.to_device(tensor.data_ptr(), array)
        if not ran:
            ran.append(run())
        else:
            if not captured:
                memory.wait()
                ran.clear()
                with memory.capture() as made:
                    ran.append(run())
                captured.extend(made)
            memory.launch(captured[0])
        memory.to_host(outputs, ran[0].data_ptr())
        memory.wait()
        return outputs

    return (host[0], host[1]), call


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A line on a terminal that counts bytes; nothing elsewhere."""
    done = 0

    def advance(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if sys.stderr.isatty():
            print(f"\r{what} {done / 1e9:6.2f} of {total / 1e9:.2f} GB", end="", file=sys.stderr, flush=True)

    yield advance
    if sys.stderr.isatty():
        print(file=sys.stderr)
