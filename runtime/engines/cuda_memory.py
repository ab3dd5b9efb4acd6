"""The few functions of the CUDA runtime library that the engine needs, through ctypes.

They cover pinned memory, one stream, copies and captured graphs. Names and numbers are those of the CUDA Runtime API,
version 13 (https://docs.nvidia.com/cuda/cuda-runtime-api/).
"""

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import UserError

TO_DEVICE, TO_HOST, ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
NON_BLOCKING, TIMING, NO_TIMING, RELAXED = 1, 0, 2, 2  # flags of a stream, of events (two) and of a capture
STAGE_BYTES = 32 * 2**20  # of each of two pinned buffers: while one is filled from the file, the other is in flight


class CudaMemory:
    """One stream of the current device."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreateWithFlags", ctypes.byref(stream), NON_BLOCKING)
        self.stream = stream.value or 0
        # pinned buffers, which are slow to allocate, each with an event
        self._stages: list[tuple[NDArray[np.uint8], ctypes.c_void_p]] = []

    def free_bytes(self) -> int:
        """Free memory of the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> NDArray[Any]:  # noqa: ANN401 (numpy's dtypes)
        """A new array in pinned memory, which is copied to and from the device without an intermediate buffer.

        It lives as long as the process.
        """
        dtype = np.dtype(dtype)
        nbytes = max(int(np.prod(shape)) * dtype.itemsize, 1)
        place = ctypes.c_void_p()
        self._call("cudaMallocHost", ctypes.byref(place), ctypes.c_size_t(nbytes))
        buffer = (ctypes.c_uint8 * nbytes).from_address(place.value or 0)
        return np.frombuffer(buffer, np.uint8)[: int(np.prod(shape)) * dtype.itemsize].view(dtype).reshape(shape)

    def to_device(self, device: int, array: NDArray[Any]) -> None:
        """Start copying an array, preferably a pinned one, to an address on the device."""
        self._copy(device, array.ctypes.data, array.nbytes, TO_DEVICE)

    def to_host(self, array: NDArray[Any], device: int) -> None:
        """Start copying from the device into an array, preferably a pinned one."""
        self._copy(array.ctypes.data, device, array.nbytes, TO_HOST)

    def wait(self) -> None:
        """Wait until everything that was started has ended."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(self.stream))

    def event(self) -> ctypes.c_void_p:
        """A mark to set on the stream and wait for; it counts as passed until it is set."""
        return self._event(NO_TIMING)

    def mark(self, event: ctypes.c_void_p) -> None:
        """Set a mark after everything that was started so far."""
        self._call("cudaEventRecord", event, ctypes.c_void_p(self.stream))

    def wait_for(self, event: ctypes.c_void_p) -> None:
        """Wait until the device has reached the place where the mark was last set."""
        self._call("cudaEventSynchronize", event)

    def upload(self, pairs: Iterable[tuple[int, NDArray[Any]]], advance: Callable[[int], object]) -> None:
        """Copy arrays in any memory, such as a mapped file, to addresses on the device, one stage at a time.

        `advance` gets the number of bytes of each stage.
        """
        for (device, part), (stage, event) in zip(_parts(pairs), cycle(self._two_stages()), strict=False):
            self.wait_for(event)  # the copy before last has left this stage
            stage[: part.size] = part
            self.to_device(device, stage[: part.size])
            self.mark(event)
            advance(part.size)
        self.wait()

    def download(self, pairs: Iterable[tuple[int, NDArray[Any]]]) -> None:
        """Copy from addresses on the device into contiguous arrays in any memory, one stage at a time."""
        arriving: deque[tuple[NDArray[np.uint8], NDArray[np.uint8], ctypes.c_void_p]] = deque()

        def take_first() -> None:
            part, stage, event = arriving.popleft()
            self.wait_for(event)
            part[...] = stage[: part.size]

        for (device, part), (stage, event) in zip(_parts(pairs), cycle(self._two_stages()), strict=False):
            if len(arriving) == len(self._stages):
                take_first()  # it has the stage that is next
            self.to_host(stage[: part.size], device)
            self.mark(event)
            arriving.append((part, stage, event))
        while arriving:
            take_first()

    def _two_stages(self) -> list[tuple[NDArray[np.uint8], ctypes.c_void_p]]:
        if not self._stages:
            self._stages = [(self.pinned((STAGE_BYTES,), np.uint8), self.event()) for _ in range(2)]
        return self._stages

    def drop_stages(self) -> None:
        """Free the buffers of uploads and downloads that have ended; the next one allocates them again."""
        for stage, event in self._stages:
            self._call("cudaEventDestroy", event)
            self._call("cudaFreeHost", ctypes.c_void_p(stage.ctypes.data))
        self._stages.clear()

    def record(self, run: Callable[[], object]) -> ctypes.c_void_p:
        """Record what `run` launches on the stream without running it; the result is a graph, ready to launch."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(self.stream), RELAXED)
        try:
            run()
        except BaseException:
            # its status is ignored: the exception says more
            self._library.cudaStreamEndCapture(ctypes.c_void_p(self.stream), ctypes.byref(graph))
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
        """Start copying from one address on the device to another."""
        self._copy(to, source, nbytes, ON_DEVICE)

    def seconds(self, start: Callable[[], object]) -> float:
        """Seconds that the device needs for what `start` starts on the stream."""
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
                f"CUDA's {name} failed with error {status} ({(text(status) or b'').decode()}); "
                "see what `nvidia-smi` says, and try again"
            )


def _parts(pairs: Iterable[tuple[int, NDArray[Any]]]) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The bytes of contiguous arrays, with the address of each on the device, in parts that fit a stage."""
    for device, array in pairs:
        data = array.reshape(-1).view(np.uint8)
        for start in range(0, data.size, STAGE_BYTES):
            yield device + start, data[start : start + STAGE_BYTES]
