"""Helpers shared by the kernel tests of every target."""

import msgspec
import numpy as np

from build.compiler import processor_target, tvm
from build.kernels.cpu.level import LEVELS
from build.kernels.cuda.binding import GPU, SERIAL
from build.kernels.table import CUDA
from build.packing.layout import packed_tensors
from build.tvm_stage.target import TVM_TARGETS
from runtime.artifact.manifest import KernelCall, TensorSpec
from runtime.engines.tvm_runtime import import_ffi

ALIGNMENT = 64  # bytes
# Code for a lesser processor cannot contain the level's own instructions.
PROCESSORS = {level.name: level.processor for level in LEVELS}
# The widths of registers that LLVM may choose from, by the processor for which it does. Of those with AVX-512, it
# prefers half a register for x86-64-v4 and a whole one for others, such as znver4.
WIDTHS = {
    "256 bits": "x86-64-v3",
    "512 bits in halves": "x86-64-v4",
    "512 bits": "x86-64-v4,-prefer-256-bit",
}
WIDTH_LEVELS = {"256 bits": "avx2", "512 bits in halves": "avx512", "512 bits": "avx512"}
# Options of a GPU kernel's serial form. Only tests run it, and optimizing it would be half of its compile time; the
# fixture `optimized` optimizes it for some of them.
NOT_OPTIMIZED = {"opt-level": 0}
SERIAL_FORM = {"processor": PROCESSORS["avx2"], **NOT_OPTIMIZED}


def _executable(function, processor, **options):
    """Compile for a processor, named as in `Level.processor`."""
    module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
    with tvm.transform.PassContext(disabled_pass=list(TVM_TARGETS["llvm"].skipped)):
        return tvm.compile(module, target=processor_target(processor, **options))


def compiled(function, processor=PROCESSORS["avx2"]):
    """A CPU kernel, compiled the way `build.tvm_stage.lower` does it."""
    return _executable(function, processor)["kernel"]


def compiled_serially(function):
    """A GPU kernel in its serial form."""
    return _executable(function, **SERIAL_FORM)["kernel"]


def run(kernel, *arrays):
    """Call a compiled kernel; return the arrays as it left them."""
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    kernel(*tensors)
    return [tensor.numpy() for tensor in tensors]


class SerialForm:
    """A GPU's kernels in their serial form."""

    def compiled(self, maker, *arguments, **options):
        """The kernel of the function that `maker` returns."""
        return compiled_serially(maker(*arguments, on=SERIAL, **options))

    def run(self, kernel, *arrays):
        """Call a kernel; return the arrays as it left them."""
        return run(kernel, *arrays)


class EmulatedGpu:
    """A GPU's kernels on the emulated one, in `process`; each call is one for each of `runs`."""

    def __init__(self, process, runs):
        self._process, self._runs = process, runs

    def compiled(self, maker, *arguments, **options):
        """The kernel of the function that `maker` returns.

        TVM's own `load_json` also looks for old versions of what it reads, which takes longer than all else here.
        """
        function = import_ffi().serialization.to_json_graph_str(maker(*arguments, on=GPU, **options))
        return self._process.ask("compile", function)

    def run(self, kernel, *arrays):
        """Call a kernel; return the arrays as it left them.

        Raises `tests.emulator.gpu.EmulatorError` with what was found, also if two runs do not give the same bits.
        """
        return self._process.ask("run", kernel, arrays, self._runs)


def machine_code(function, processor):
    """A kernel's instructions as text, whether or not this machine can run them."""
    return _executable(function, processor).mod.inspect_source("s")


def call_of(op, *arguments):
    """The call of a kernel with these arguments for its maker."""
    parameters = tuple(
        TensorSpec(name=str(b.name), shape=tuple(map(int, b.shape)), dtype=str(b.dtype))
        for b in CUDA[op](*arguments).params
    )
    arguments = tuple(map(msgspec.to_builtins, arguments))
    return KernelCall(
        kernel=f"{op}_0", op=op, arguments=arguments, parameters=parameters, calls={"step_1": 1}, bytes=1, flops=1
    )


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
