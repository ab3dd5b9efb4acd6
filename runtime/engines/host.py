"""Artifacts in the host's memory."""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.folder import Artifact
from runtime.artifact.manifest import CALL_INPUTS, TensorSpec
from runtime.artifact.tensor_file import numpy_dtype, tensor_bytes
from runtime.engines.loaded_artifact import SMALLER, LoadedArtifact
from runtime.engines.tvm_runtime import CPU_DEVICE, load_runtime, open_library, start_machine
from runtime.errors import UserError
from runtime.process_memory import machine_memory

ALIGNMENT = 64  # bytes; generated code assumes it of every tensor and does not check


def load(opened: Artifact, threads: int) -> LoadedArtifact:
    """Load an artifact into this process.

    The weights are mapped, the caches are new, and the compiled functions read and write their arrays in place.
    """
    manifest = opened.manifest
    check_memory(sum(map(tensor_bytes, manifest.graphs[-1].signature.caches)))
    ffi = load_runtime(threads)
    machine = start_machine(open_library(ffi, opened.sealed_library()), CPU_DEVICE)
    mapped = opened.weights()
    weights = [_tensor(ffi, mapped[spec.name]) for spec in manifest.weights]
    caches = [_aligned(spec) for spec in manifest.graphs[-1].signature.caches]
    cache_tensors = [_tensor(ffi, cache) for cache in caches]
    inputs, functions = {}, {}
    for graph in manifest.graphs:
        ids, positions = (_aligned(spec) for spec in graph.signature.inputs[:CALL_INPUTS])
        inputs[graph.tokens] = (ids, positions)
        functions[graph.tokens] = _bound(
            machine[graph.name], [_tensor(ffi, ids), _tensor(ffi, positions), *cache_tensors, *weights]
        )
    return LoadedArtifact(inputs, functions, caches)


def check_memory(caches: int) -> None:
    """Raise `UserError` for caches of more bytes than the machine has: a process that fills them would be killed."""
    memory = machine_memory()
    if caches > memory:
        raise UserError(
            f"the caches take {caches / 1e9:,.1f} GB, but this machine has {memory / 1e9:,.1f} GB of memory; "
            f"use a larger machine, or {SMALLER}"
        )


def _bound(function: Callable[..., Any], arguments: list[Any]) -> Callable[[], NDArray[np.float32]]:
    """A compiled function bound to its arguments, whose memory stays the same."""
    return lambda: np.asarray(np.from_dlpack(function(*arguments)), np.float32)


def _aligned(spec: TensorSpec) -> NDArray[Any]:
    """A zeroed array whose data begins at a multiple of ALIGNMENT."""
    dtype = numpy_dtype(spec.dtype)
    nbytes = int(np.prod(spec.shape)) * dtype.itemsize
    buffer = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + nbytes].view(dtype).reshape(spec.shape)


def _tensor(ffi: Any, array: NDArray[Any]) -> Any:  # noqa: ANN401
    """A tensor that shares the array's memory."""
    return ffi.from_dlpack(array, require_alignment=ALIGNMENT, require_contiguous=True)
