"""What the tests of kernels of every target share."""

from build.compiler import tvm
from build.layout import packed_tensors
from build.target import TARGETS

TARGET = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})


def compiled(function):
    """A kernel for the CPU, as `build.lower` compiles it."""
    with tvm.transform.PassContext(disabled_pass=list(TARGETS["llvm"].skipped)):
        return tvm.compile(tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")}), target=TARGET)["kernel"]


def packed(tensor, arrays, kind, workers=1):
    """The arrays of a stored tensor, as an artifact of a target's kind holds them."""
    return [part.pack(arrays[part.spec.name], workers) if part.pack else arrays[part.spec.name] for part in packed_tensors(tensor, 1, kind)]
