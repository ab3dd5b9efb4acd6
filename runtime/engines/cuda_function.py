"""Calls of compiled functions on a device, each of which becomes the launch of a recorded CUDA graph."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Function
from runtime.engines.cuda_device import Device
from runtime.engines.cuda_memory import CudaMemory


class RecordedCall:
    """A call that always launches the same kernels on the same memory.

    The first time it runs as it is, the second time it is recorded, and from then on the recorded graph is launched.
    The function to run is passed in each time and not kept: its owner holds this object, and a reference back would
    make a cycle that keeps the owner's weights in memory.
    """

    def __init__(self, memory: CudaMemory) -> None:
        self._memory = memory
        self._output: Any = None  # of the plain run, then of the recorded one; the latter must not move
        self._graph: Any = None

    def __call__(self, run: Callable[[], Any]) -> Any:  # noqa: ANN401 (a tensor)
        """Start `run`, which must be the same each time; the next call reuses the memory of the returned output."""
        if self._output is None:
            self._output = run()
            return self._output
        if self._graph is None:
            self._memory.wait()
            self._output = None
            self._graph = self._memory.record(lambda: self._keep(run()))
        self._memory.launch(self._graph)
        return self._output

    def _keep(self, output: Any) -> None:  # noqa: ANN401
        self._output = output


class GraphFunction:
    """One compiled function bound to its tensors (`runtime.engines.loaded_artifact.Call`); its inputs are pinned."""

    def __init__(self, device: Device, function: Callable[..., Any], described: Function, rest: Sequence[Any]) -> None:
        self._memory = device.memory
        self._on_stream = device.on_stream
        self._function = function
        self._rest = rest  # caches and weights
        specs = described.signature.call
        self.inputs: Mapping[str, NDArray[np.int64]] = {
            spec.name: device.memory.pinned(spec.shape, np.int64) for spec in specs
        }
        self.on_device = {spec.name: device.tensor(spec) for spec in specs}
        self._outputs = device.memory.pinned(described.signature.outputs[0].shape, np.float32)
        self._call = RecordedCall(device.memory)

    def run(self) -> Any:  # noqa: ANN401 (a tensor)
        """Launch the function's kernels on the inputs that are on the device; the outputs stay there."""
        with self._on_stream():
            return self._function(*self.on_device.values(), *self._rest)

    def send_inputs(self) -> None:
        """Start copying the inputs to the device."""
        for name, array in self.inputs.items():
            self._memory.to_device(self.on_device[name].data_ptr(), array)

    def __call__(self) -> NDArray[np.float32]:
        """The outputs (B, T or 1, n_outputs) for the current inputs, in pinned memory that the next call reuses."""
        self.send_inputs()
        outputs = self._call(self.run)
        self._memory.to_host(self._outputs, outputs.data_ptr())
        self._memory.wait()
        return self._outputs
