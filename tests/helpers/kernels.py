"""Helpers shared by the kernel tests of every target."""

import numpy as np

from build.compiler import tvm
from build.packing.layout import packed_tensors
from build.tvm_stage.target import TVM_TARGETS

ALIGNMENT = 64  # bytes
# LLVM's name for the least capable processor that has all flags of a level. Code for a lesser one cannot contain the
# level's own instructions.
PROCESSORS = {"any": "x86-64", "avx2": "x86-64-v3", "avx512": "x86-64-v4", "avx512-vnni": "cascadelake"}


def _executable(function, processor, **options):
    target = tvm.target.Target({"kind": "llvm", "mcpu": processor, **options})
    with tvm.transform.PassContext(disabled_pass=list(TVM_TARGETS["llvm"].skipped)):
        return tvm.compile(tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")}), target=target)


def compiled(function, processor=PROCESSORS["avx2"]):
    """A CPU kernel, compiled the way `build.tvm_stage.lower` does it."""
    return _executable(function, processor)["kernel"]


def compiled_serially(function):
    """A GPU kernel in its serial form, which only tests run; optimizing it would be half of its compile time."""
    return _executable(function, PROCESSORS["avx2"], **{"opt-level": 0})["kernel"]


def machine_code(function, processor):
    """A kernel's instructions as text, whether or not this machine can run them."""
    return _executable(function, processor).mod.inspect_source("s")


def packed(tensor, arrays, kind, workers=1):
    """The arrays of a stored tensor, as an artifact for this kind of target holds them."""
    return [
        part.pack(arrays[part.spec.name], workers) if part.pack else arrays[part.spec.name]
        for part in packed_tensors(tensor, 1, kind)
    ]


def aligned(array):
    """A copy whose start is aligned as generated code assumes."""
    buffer = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy
