"""What the tests of kernels of every target share."""

import numpy as np

from build.compiler import tvm
from build.layout import packed_tensors
from build.target import TARGETS

ALIGNMENT = 64  # bytes
TARGET = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})


def compiled(function):
    """A kernel for the CPU, as `build.lower` compiles it."""
    with tvm.transform.PassContext(disabled_pass=list(TARGETS["llvm"].skipped)):
        return tvm.compile(tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")}), target=TARGET)["kernel"]


def packed(tensor, arrays, kind, workers=1):
    """The arrays of a stored tensor, as an artifact of a target's kind holds them."""
    return [part.pack(arrays[part.spec.name], workers) if part.pack else arrays[part.spec.name] for part in packed_tensors(tensor, 1, kind)]


def aligned(array):
    """A copy that begins where generated code assumes it to."""
    buffer = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
