"""One kernel after the other on the device: right or wrong, and how long it takes.

A kernel's outputs are compared with a reference in float64 (`runtime.gpu_check.kernel_cases`). Then it is timed: a
captured graph launches it many times on several copies of its weights, so that they come from memory and not from a
cache.
"""

from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import KernelCall, TensorSpec
from runtime.artifact.tensor_file import numpy_dtype, tensor_bytes
from runtime.gpu_check.kernel_cases import case_of
from runtime.gpu_check.report import KernelRow, label_of

Array = NDArray[Any]

COLD_BYTES = 256 * 2**20  # copies of a kernel's weights take this much, several times the L2 cache of any GPU
LAUNCHES, PASSES = 64, 3  # most launches of a kernel in one graph, and how often the graph is timed
GRAPH_SECONDS = 0.02  # time that a graph of launches should take


class KernelDevice(Protocol):
    """The device that kernels are called on and timed with."""

    def upload(self, array: Array) -> Any:  # noqa: ANN401 (tensors of a runtime)
        """A tensor with the array's numbers."""

    def copy(self, tensor: Any, spec: TensorSpec) -> Any:  # noqa: ANN401
        """Another tensor with the same numbers."""

    def download(self, tensor: Any, spec: TensorSpec) -> Array:  # noqa: ANN401
        """A tensor's numbers."""

    def run(self, function: Callable[..., Any], tensors: Sequence[Any]) -> None:
        """Call a kernel and wait for it."""

    def seconds(self, function: Callable[..., Any], sets: Sequence[Sequence[Any]], calls: int) -> float:
        """Mean time of a call, over `calls` calls that take one set of tensors after the other."""


def check_kernel(call: KernelCall, function: Callable[..., Any], device: KernelDevice, *, half: bool) -> KernelRow:
    """Compare one kernel with its reference, which allows for rounding to float16 if `half`, and time it."""
    case = case_of(call, half=half)
    tensors = [device.upload(array) for array in case.arrays]
    device.run(function, tensors)
    found = [
        device.download(tensor, spec) if i in case.compared else array
        for i, (tensor, spec, array) in enumerate(zip(tensors, call.parameters, case.arrays, strict=True))
    ]
    calls = max(1, min(LAUNCHES, round(GRAPH_SECONDS / device.seconds(function, [tensors], 1))))
    held = sum(case.arrays[i].nbytes for i in case.held)
    copies = min(calls, -(-COLD_BYTES // max(held, 1))) if held else 1
    sets = [tensors]
    for _ in range(copies - 1):
        sets.append(
            [device.copy(tensor, call.parameters[i]) if i in case.held else tensor for i, tensor in enumerate(tensors)]
        )
    seconds = device.seconds(function, sets, -(-calls // copies) * copies)
    moved = sum(tensor_bytes(spec) for i, spec in enumerate(call.parameters[: case.output + 1]) if i not in case.held)
    cold = copies * held >= COLD_BYTES
    return KernelRow(
        call.kernel,
        label_of(call),
        " ".join(sorted(call.calls)),
        case.error(found),
        seconds,
        call.bytes + moved,
        call.flops,
        cold,
    )


class CudaKernels:
    """The device of `runtime.engines.cuda`, on which kernels are called one by one."""

    # the device is a runtime.engines.cuda_device.Device, which loads TVM's runtime
    def __init__(self, device: Any) -> None:  # noqa: ANN401
        self._device = device

    def upload(self, array: Array) -> Any:  # noqa: ANN401
        """A tensor with the array's numbers."""
        tensor = self._device.tensor(TensorSpec(name="", shape=array.shape, dtype=str(array.dtype)))  # type: ignore[arg-type]
        self._device.memory.upload([(tensor.data_ptr(), array)], lambda _nbytes: None)
        return tensor

    def download(self, tensor: Any, spec: TensorSpec) -> Array:  # noqa: ANN401
        """A tensor's numbers."""
        array = np.empty(spec.shape, numpy_dtype(spec.dtype))
        self._device.memory.to_host(array, tensor.data_ptr())
        self._device.memory.wait()
        return array

    def copy(self, tensor: Any, spec: TensorSpec) -> Any:  # noqa: ANN401
        """Another tensor with the same numbers."""
        other = self._device.tensor(spec)
        self._device.memory.on_device(other.data_ptr(), tensor.data_ptr(), tensor_bytes(spec))
        self._device.memory.wait()
        return other

    def run(self, function: Callable[..., Any], tensors: Sequence[Any]) -> None:
        """Call a kernel and wait for it."""
        with self._device.on_stream():
            function(*tensors)
        self._device.memory.wait()

    def seconds(self, function: Callable[..., Any], sets: Sequence[Sequence[Any]], calls: int) -> float:
        """Mean time of a call in a graph of `calls`: the median over several launches of the graph."""
        memory = self._device.memory

        def launch_all() -> None:
            with self._device.on_stream():
                for i in range(calls):
                    function(*sets[i % len(sets)])

        graph = memory.record(launch_all)
        memory.launch(graph)
        samples = [memory.seconds(lambda: memory.launch(graph)) for _ in range(PASSES)]
        memory.forget(graph)
        return median(samples) / calls

    def copy_gb_s(self, nbytes: int = 2**30) -> float:
        """Bandwidth of a copy on the device, counting bytes read and written; the best of several."""
        spec = TensorSpec(name="", shape=(nbytes,), dtype="uint8")
        source, target = self._device.tensor(spec), self._device.tensor(spec)
        memory = self._device.memory
        copy = partial(memory.on_device, target.data_ptr(), source.data_ptr(), nbytes)
        return 2 * nbytes / min(memory.seconds(copy) for _ in range(PASSES + 1)) / 1e9
