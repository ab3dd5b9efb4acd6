"""Decode steps that draw their own ids on the device (`runtime.engines.loaded_artifact.DeviceSampler`).

One graph holds a step of one row, the draw, and the update of id and position for the next step. A step's options are
sent and its id is received through pinned memory; each of the two steps in flight has its own. So the device runs from
step to step by itself, and the host waits only for ids.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from runtime.artifact.manifest import IDS, POSITIONS, SLOTS, TensorSpec
from runtime.engines.cuda_device import Device
from runtime.engines.cuda_function import GraphFunction, RecordedCall
from runtime.engines.loaded_artifact import MAX_STEPS_IN_FLIGHT

OPTIONS = TensorSpec(name="options", shape=(3,), dtype="float32")
TOKEN = TensorSpec(name="token", shape=(1,), dtype="int64")


class CudaSampler:
    """`runtime.engines.loaded_artifact.DeviceSampler` of the step of one row and the library's kernel `sample`."""

    def __init__(self, device: Device, step: GraphFunction, sample: Callable[..., Any]) -> None:
        self._memory = device.memory
        self._on_stream = device.on_stream
        self._function = step
        self._sample = sample
        self._options, self._token = device.tensor(OPTIONS), device.tensor(TOKEN)
        self._buffers = [
            (
                device.memory.pinned(OPTIONS.shape, np.float32),
                device.memory.pinned(TOKEN.shape, np.int64),
                device.memory.event(),
            )
            for _ in range(MAX_STEPS_IN_FLIGHT)
        ]
        self._step = RecordedCall(device.memory)
        self._started = self._finished = 0

    def _run(self) -> Any:  # noqa: ANN401 (a tensor)
        logits = self._function.run()
        inputs = self._function.on_device
        with self._on_stream():
            self._sample(logits, self._options, inputs[IDS], inputs[POSITIONS], self._token)
        return logits

    def begin(self, token_id: int, position: int, slot: int) -> None:
        """Set the id that the next step is fed, its position and its slot."""
        self.abandon()
        inputs = self._function.inputs
        inputs[IDS][...], inputs[POSITIONS][...], inputs[SLOTS][...] = token_id, position, slot
        self._function.send_inputs()

    def start(self, temperature: float, top_k: int, draw: float) -> None:
        """Start a step."""
        assert self._started - self._finished < MAX_STEPS_IN_FLIGHT
        options, token, event = self._buffers[self._started % MAX_STEPS_IN_FLIGHT]
        options[...] = temperature, top_k, draw
        self._memory.to_device(self._options.data_ptr(), options)
        self._step(self._run)
        self._memory.to_host(token, self._token.data_ptr())
        self._memory.mark(event)
        self._started += 1

    def finish(self) -> int:
        """Wait for the oldest step in flight; the id that it drew."""
        assert self._finished < self._started
        _, token, event = self._buffers[self._finished % MAX_STEPS_IN_FLIGHT]
        self._memory.wait_for(event)
        self._finished += 1
        return int(token[0])

    def abandon(self) -> None:
        """Wait for the steps in flight, and discard what they drew."""
        self._memory.wait()
        self._finished = self._started
