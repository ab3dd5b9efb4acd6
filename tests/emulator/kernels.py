"""Kernels on the emulated GPU: from TVM's functions by its CUDA code generator, and called through its runtime."""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm_ffi
from numpy.typing import NDArray

from build.compiler import tvm
from build.kernels.cuda.binding import GPU
from build.tvm_stage import cuda
from build.tvm_stage.target import TVM_TARGETS
from runtime.artifact.manifest import TargetSpec
from runtime.engines.tvm_runtime import find_library
from tests.emulator.gpu import EmulatorError, Gpu, Run

SPEC = TargetSpec(kind="cuda", dtype="fp16", cpu="x86-64-v3", cpu_features=(), arch=("sm_80",))
TVM_CUDA = "libtvm_runtime_cuda.so"


def load(folder: Path, *, exact_scratch: bool = True) -> Gpu:
    """The emulated GPU as TVM's CUDA device, in place of whatever this machine has.

    It must come before anything else has loaded TVM's CUDA library. With `exact_scratch`, what a kernel keeps between
    its launches lies in allocations of its own size, else in those of TVM's pool, which are whole pages.
    """
    gpu = Gpu(folder)
    ctypes.CDLL(str(find_library(TVM_CUDA)), ctypes.RTLD_GLOBAL)
    tvm.register_global_func(cuda.COMPILE_CALLBACK, lambda source: bytearray(gpu.module(source)), override=True)
    if exact_scratch:
        register = ctypes.CDLL(str(Path(tvm_ffi.__file__).parent / "lib" / "libtvm_ffi.so"))
        for name, own in (
            ("__TVMBackendAllocWorkspace", gpu.driver.emulator_scratch),
            ("__TVMBackendFreeWorkspace", gpu.driver.emulator_scratch_end),
        ):
            status = register.TVMFFIEnvModRegisterContextSymbol(name.encode(), ctypes.cast(own, ctypes.c_void_p))
            assert status == 0, f"{name} cannot be replaced"
    return gpu


class EmulatedKernels:
    """Makes and calls kernels; each call is one launch sequence for each of `runs`, which must give the same bits."""

    binding = GPU

    def __init__(self, gpu: Gpu, runs: Sequence[Run]) -> None:
        self._gpu, self._runs = gpu, runs

    def compiled(self, maker: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """A kernel, from the function that `maker` returns for a GPU."""
        function = maker(*arguments, on=GPU, **options)
        module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
        return tvm.compile(module, target=TVM_TARGETS["cuda"].make(SPEC))["kernel"]

    def run(self, kernel: Callable[..., None], *arrays: NDArray[Any]) -> list[NDArray[Any]]:
        """Call a kernel; return the arrays as it left them.

        Raises `EmulatorError` with what was found, or if the order of threads can be seen in a result.
        """
        first, *others = (self._run(run, kernel, arrays) for run in self._runs)
        for run, found in zip(self._runs[1:], others, strict=True):
            for i, (one, other) in enumerate(zip(first, found, strict=True)):
                if one.tobytes() != other.tobytes():
                    raise EmulatorError(f"parameter {i} has other bits: {self._runs[0]}; {run}")
        return first

    def _run(self, run: Run, kernel: Callable[..., None], arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        self._gpu.set(run)
        tensors = [tvm.runtime.tensor(np.ascontiguousarray(array), tvm.cuda(0)) for array in arrays]
        try:
            kernel(*tensors)
        except Exception as error:
            raise EmulatorError(self._gpu.error or str(error)[:500]) from None  # TVM's holds the whole source
        return [tensor.numpy() for tensor in tensors]
