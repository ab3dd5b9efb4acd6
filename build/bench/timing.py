"""Compile a kernel by itself, and time calls of several ones in turns."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from build.bench.turns import rotated
from build.compiler import processor_target, tvm, tvm_ffi
from build.tvm_stage.target import TVM_TARGETS
from export.weights.format import Array
from runtime.engines.host import ALIGNMENT

HUGE = 2**21  # bytes of a huge page

Call = Callable[[], object]


def compiled(kernel: Any, processor: str) -> Any:  # noqa: ANN401 (TVM's functions)
    """A CPU kernel, compiled as in an artifact for a processor that is named as in `Level.processor`."""
    module = tvm.IRModule({"kernel": kernel.with_attr("global_symbol", "kernel")})
    with tvm.transform.PassContext(disabled_pass=list(TVM_TARGETS["llvm"].skipped)):
        return tvm.compile(module, target=processor_target(processor))["kernel"]


def tensor(array: Array) -> Any:  # noqa: ANN401 (TVM's tensors)
    """A copy of an array as an argument of kernels; if it is large, it lies in huge pages where Linux has some left."""
    alignment = HUGE if array.nbytes >= HUGE else ALIGNMENT
    buffer = np.empty(array.nbytes + alignment, np.uint8)
    start = -buffer.ctypes.data % alignment
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return tvm_ffi.from_dlpack(copy)


def seconds_of(call: Call) -> float:
    """Seconds that one call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(calls: Sequence[Call], seconds: float, least: int = 5) -> list[list[float]]:
    """Seconds of each call, in rounds that run every call once, for so many seconds and at least so many rounds."""
    samples: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()  # the first touch of code and data is not counted
    stop = time.perf_counter() + seconds
    turn = 0
    while turn < least or time.perf_counter() < stop:
        for i in rotated(range(len(calls)), turn):
            samples[i].append(seconds_of(calls[i]))
        turn += 1
    return samples
