"""An artifact on a CUDA device: weights and caches stay there, a call's inputs are copied there, a call is one graph.

Loading ends with one run of each function on padding, which touches no cache but loads the kernels and allocates the
workspace that they will need. The next call of a function records its launches without running them. From then on a
call launches that graph, which reads its inputs, caches and weights from the same addresses: ids, positions, slots and
the column that is wanted are numbers in memory, so each function has one graph for all of them. Outputs come back into
pinned memory; the host waits for nothing else. Steps that draw their own ids (`runtime.engines.cuda_sampler`) leave the
outputs on the device.

One model per process, called by one thread: the workspace in which TVM keeps a kernel's data between its launches
belongs to the thread, and a page of it is freed when a larger one is requested. A second model could free memory that
the first one's graphs point to.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from runtime.artifact.folder import Artifact
from runtime.artifact.manifest import COLUMN, IDS, POSITIONS, SLOTS, Manifest
from runtime.engines.cuda_caches import CudaCaches
from runtime.engines.cuda_device import Device
from runtime.engines.cuda_function import GraphFunction
from runtime.engines.cuda_sampler import CudaSampler
from runtime.engines.loaded_artifact import HIDDEN, PADDING_ID, SMALLER, LoadedArtifact, device_bytes
from runtime.engines.tvm_runtime import CPU_DEVICE, CUDA_DEVICE, kernel_of, open_library, start_machine
from runtime.errors import UserError
from runtime.progress import progress

PADDING = {IDS: PADDING_ID, POSITIONS: HIDDEN, SLOTS: 0, COLUMN: 0}  # inputs of a call that touches no cache


def load(opened: Artifact, threads: int) -> LoadedArtifact:
    """Load an artifact onto the first device.

    Raises `UserError` if there is no driver, no device that fits, or too little memory.
    """
    target = opened.manifest.target
    library = opened.sealed_library(target.levels[0])  # the host's part, which has one level
    return load_library(Device.open(target.arch, threads), opened.manifest, library, opened.weights())


def load_library(
    device: Device, manifest: Manifest, library: Path, arrays: Mapping[str, NDArray[Any]]
) -> LoadedArtifact:
    """Load a compiled library and weights by name onto a device; raises `UserError` if its free memory is too small."""
    check_memory(device_bytes(manifest), device.memory.free_bytes())
    opened = open_library(device.ffi, library)
    machine = start_machine(opened, CUDA_DEVICE, CPU_DEVICE)
    weights = [device.tensor(spec) for spec in manifest.weights]
    with progress("loading weights", sum(array.nbytes for array in arrays.values())) as advance:
        device.memory.upload(
            ((tensor.data_ptr(), arrays[spec.name]) for tensor, spec in zip(weights, manifest.weights, strict=True)),
            advance,
        )
    device.memory.drop_stages()  # no upload as large follows
    rings = [device.tensor(spec) for spec in manifest.caches]
    functions = {
        described.name: GraphFunction(device, machine[described.name], described, [*rings, *weights])
        for described in manifest.functions
    }
    for function in functions.values():
        for name, array in function.inputs.items():
            array[...] = PADDING[name]
        function()
    sample = next((call.kernel for call in manifest.calls if call.op == "sample"), None)
    device_sampler = None
    if sample is not None:
        device_sampler = CudaSampler(device, functions["step_1"], kernel_of(opened, sample))
        device_sampler.begin(PADDING_ID, HIDDEN, slot=0)
        device_sampler.start(temperature=1.0, top_k=1, draw=0.0)
        device_sampler.finish()
    caches = CudaCaches(device.memory, manifest.caches, rings)
    return LoadedArtifact(functions, caches, device_sampler, manifest.target.cpu)


def check_memory(needed: int, free: int) -> None:
    """Raise `UserError` unless `needed` bytes fit into the `free` bytes of a device."""
    if needed > free:
        raise UserError(
            f"the GPU has {free / 1e9:,.1f} GB free, but weights, caches and workspace take {needed / 1e9:,.1f} GB; "
            f"stop whatever else runs there, or {SMALLER}"
        )
