"""An artifact on a CUDA device: weights and caches lie there, ids and positions are copied there, and a call is one captured graph.

Loading ends with one run of each function on padding, which touches no cache but loads kernels and makes every workspace that will ever be needed:
TVM keeps freed workspace and gives it back to the device only when an allocation fails, and none follows. The next call of a function records its
launches without running them, and from then on a call is a launch of that graph, which reads ids, positions, caches and weights from where they
were. Outputs come back into pinned memory, and nothing else is waited for.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact import Artifact
from runtime.cuda_driver import check_driver, read_driver
from runtime.cuda_memory import CudaMemory
from runtime.errors import UserError
from runtime.loaded import PADDING_ID, SMALLER, Loaded, device_bytes
from runtime.manifest import CALL_INPUTS, Graph, TensorSpec, WeightSpec
from runtime.tensor_file import numpy_dtype
from runtime.tvm_runtime import CPU_DEVICE, CUDA_DEVICE, CUDA_LIBRARIES, find_library, load_runtime, open_library


def load(opened: Artifact, threads: int) -> Loaded:
    """Bring an artifact onto the first device; raises `UserError` when there is no driver, no fitting device or too little memory."""
    manifest = opened.manifest
    check_driver(read_driver(), manifest.target.arch)
    cudart = ctypes.CDLL(str(find_library(CUDA_LIBRARIES[0])), ctypes.RTLD_GLOBAL)
    ffi = load_runtime(threads)
    ctypes.CDLL(str(find_library(CUDA_LIBRARIES[1])), ctypes.RTLD_GLOBAL)
    memory = CudaMemory(cudart)
    specs = manifest.graphs[-1].signature.caches
    check_memory(device_bytes(manifest), memory.free_bytes())
    machine = open_library(ffi, opened.library, CUDA_DEVICE, CPU_DEVICE)
    weights = [_tensor(ffi, spec) for spec in manifest.weights]
    mapped = opened.weights()
    with progress("loading weights", sum(array.nbytes for array in mapped.values())) as advance:
        memory.upload(((tensor.data_ptr(), mapped[spec.name]) for tensor, spec in zip(weights, manifest.weights, strict=True)), advance)
    caches = [_tensor(ffi, spec) for spec in specs]
    inputs, functions = {}, {}
    for graph in manifest.graphs:
        inputs[graph.tokens], functions[graph.tokens] = _function(ffi, memory, machine[graph.name], graph, [*caches, *weights])
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


def _tensor(ffi: Any, spec: WeightSpec | TensorSpec) -> Any:  # noqa: ANN401 (TVM's objects)
    """A new tensor on the device, of whatever its memory holds."""
    allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
    return allocate(ffi.Shape(spec.shape), ffi.dtype(str(numpy_dtype(spec.dtype))), ffi.device("cuda", 0), None)


def _function(
    ffi: Any,  # noqa: ANN401
    memory: CudaMemory,
    function: Callable[..., Any],
    graph: Graph,
    rest: list[Any],
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], Callable[[], NDArray[np.float32]]]:
    """Pinned ids and positions, and a call of one compiled function on them, which becomes a launch of a graph."""
    specs = graph.signature.inputs[:CALL_INPUTS]
    host = [memory.pinned(spec.shape, np.int64) for spec in specs]
    device = [_tensor(ffi, spec) for spec in specs]
    outputs = memory.pinned(graph.signature.outputs[0].shape, np.float32)
    ran: list[Any] = []  # the output of a plain run; then of the captured one, which must stay where it is
    captured: list[ctypes.c_void_p] = []

    def run() -> Any:  # noqa: ANN401
        with ffi.use_raw_stream(ffi.device("cuda", 0), memory.stream):
            return function(*device, *rest)

    def call() -> NDArray[np.float32]:
        for array, tensor in zip(host, device, strict=True):
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
