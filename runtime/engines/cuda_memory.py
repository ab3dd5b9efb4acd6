"""The few functions of the CUDA runtime library that the engine needs, through ctypes: pinned memory, one stream, copies, captured graphs.

Names and numbers are those of the CUDA Runtime API, version 13 (https://docs.nvidia.com/cuda/cuda-runtime-api/).
"""

import ctypes
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UserError

TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
NON_BLOCKING, TIMING, NO_TIMING, RELAXED = 1, 0, 2, 2  # of a stream, events, a capture
STAGE_BYTES = 32 * 2**20  # of each of two pinned buffers: while one is filled from the file, the other is on its way


class CudaMemory:
    """One stream of the current device."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), NON_BLOCKING)
        self.stream = stream.value or 0
        self._stages: list[
            tuple[NDArray[np.uint8], ctypes.c_void_p]
        ] = []  # pinned buffers, which take long to make, and an event of each

    def free_bytes(self) -> int:
        """Free memory of the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:  # noqa: ANN401 (numpy's dtypes)
        """A new array whose memory copies to and from the device do not pass through another buffer; it lives as long as the process."""
        dtype = np.dtype(dtype)
        nbytes = max(int(np.prod(shape)) * dtype.itemsize, 1)
        place = ctypes.c_void_p()
        self._call("cudaMallocHost", ctypes.byref(place), ctypes.c_size_t(nbytes))
        buffer = (ctypes.c_uint8 * nbytes).from_address(place.value or 0)
        return np.frombuffer(buffer, np.uint8)[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)

    def to_device(self, device: int, array: NDArray[Any]) -> None:
        """Start a copy of an array, best a pinned one, to an address on the device."""
        self._copy(device, array.ctypes.data, array.nbytes, TO_DEVICE)

    def to_host(self, array: NDArray[Any], device: int) -> None:
        """Start a copy from the device into an array, best a pinned one."""
        self._copy(array.ctypes.data, device, array.nbytes, TO_HOST)

    def wait(self) -> None:
        """Until all that was started has ended."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def event(self) -> ctypes.c_void_p:
        """A mark for the stream, to wait for; it counts as passed until it is set."""
        return self._event(NO_TIMING)

    def mark(self, event: ctypes.c_void_p) -> None:
        """Set a mark behind all that was started."""
        self._call("cudaEventRecord", event, ctypes.c_void_p(self.stream))

    def wait_for(self, event: ctypes.c_void_p) -> None:
        """Until the device has come to where a mark was set last."""
        self._call("cudaEventSynchronize", event)

    def upload(self, pairs: Iterable[tuple[int, NDArray[Any]]], advance: Callable[[int], object]) -> None:
        """Copy arrays of any memory, such as a mapped file, to addresses on the device, a stage at a time; `advance` gets the bytes of each."""
        if not self._stages:
            self._stages = [(self.pinned((STAGE_BYTES,), np.uint8), self.event()) for _ in range(2)]
        turn = 0
        for device, array in pairs:
            data = array.reshape(-1).view(np.uint8)
            for start in range(0, data.size, STAGE_BYTES):
                part = data[start : start + STAGE_BYTES]
                stage, event = self._stages[turn]
                self.wait_for(event)  # the copy before the last has left this stage
                stage[: part.size] = part
                self.to_device(device + start, stage[: part.size])
                self.mark(event)
                advance(part.size)
                turn = 1 - turn
        self.wait()

    def drop_stages(self) -> None:
        """Give the buffers of `upload` back, which has ended; the next one makes them again."""
        for stage, event in self._stages:
            self._call("cudaEventDestroy", event)
            self._call("cudaFreeHost", ctypes.c_void_p(stage.ctypes.data))
        self._stages.clear()

    def record(self, run: Callable[[], object]) -> ctypes.c_void_p:
        """What `run` launches on the stream, recorded and not run: a graph, ready to launch."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(self.stream), RELAXED)
        try:
            run()
        except BaseException:
            self._library.cudaStreamEndCapture(
                ctypes.c_void_p(self.stream), ctypes.byref(graph)
            )  # whatever it says: what was raised says more
            raise
        self._call("cudaStreamEndCapture", ctypes.c_void_p(self.stream), ctypes.byref(graph))
        self._call("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._call("cudaGraphDestroy", graph)
        return executable

    def launch(self, graph: ctypes.c_void_p) -> None:
        """Start a recorded graph."""
        self._call("cudaGraphLaunch", graph, ctypes.c_void_p(self.stream))

    def forget(self, graph: ctypes.c_void_p) -> None:
        """Free a recorded graph, which must not be running."""
        self._call("cudaGraphExecDestroy", graph)

    def on_device(self, to: int, source: int, nbytes: int) -> None:
        """Start a copy from one address on the device to another."""
        self._copy(to, source, nbytes, ON_DEVICE)

    def seconds(self, start: Callable[[], object]) -> float:
        """How long the device takes for what `start` starts on the stream."""
        before, after = self._event(TIMING), self._event(TIMING)
        self.wait()
        self.mark(before)
        start()
        self.mark(after)
        self.wait()
        milliseconds = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(milliseconds), before, after)
        for event in (before, after):
            self._call("cudaEventDestroy", event)
        return milliseconds.value / 1e3

    def _copy(self, to: int, source: int, nbytes: int, kind: int) -> None:
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(nbytes),
            kind,
            ctypes.c_void_p(self.stream),
        )

    def _event(self, flags: int) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self._call("cudaEventCreateWithFlags", ctypes.byref(event), flags)
        return event

    def _call(self, name: str, *arguments: Any) -> None:  # noqa: ANN401 (C values)
        status = getattr(self._library, name)(*arguments)
        if status:
            text = self._library.cudaGetErrorString
            text.restype = ctypes.c_char_p
            raise UserError(
                f"CUDA's {name} failed with error {status} ({(text(status) or b'').decode()}); see what `nvidia-smi` says, and try again"
            )
