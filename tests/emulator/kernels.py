"""Kernels on the emulated GPU of this process: from TVM's functions by its CUDA code generator, through its runtime."""

import ctypes
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from build.compiler import processor_target, tvm
from build.tvm_stage import cuda
from runtime.engines.tvm_runtime import find_library, import_ffi
from tests.emulator.gpu import EmulatorError, Gpu, Run

Array = NDArray[Any]
Kernel = Callable[..., None]

HOST = "x86-64-v3"
TVM_CUDA = "libtvm_runtime_cuda.so"


class EmulatedKernels:
    """Compiles kernels for the emulated GPU, and calls them."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.source = ""  # of what was compiled last
        self._change: Callable[[str], str] = lambda source: source
        # the host's code only launches; optimizing it would take a third of TVM's time
        self._target = tvm.target.Target(
            {"kind": "cuda", "arch": "sm_80"}, host=processor_target(HOST, **{"opt-level": 0})
        )

    @classmethod
    def load(cls, folder: Path, *, exact_scratch: bool = True) -> "EmulatedKernels":
        """Make the emulated GPU TVM's CUDA device in this process, which must not have loaded TVM's CUDA library yet.

        `folder` keeps what is compiled. With `exact_scratch`, what a kernel keeps between its launches lies in
        allocations of its own size, otherwise in those of TVM's pool, which are whole pages.
        """
        gpu = Gpu(folder)
        kernels = cls(gpu)
        ctypes.CDLL(str(find_library(TVM_CUDA)), ctypes.RTLD_GLOBAL)
        if exact_scratch:
            _replace_scratch(gpu)
        tvm.register_global_func(cuda.COMPILE_CALLBACK, kernels.module, override=True)
        return kernels

    def module(self, source: str) -> bytearray:
        """What stands for the machine code of a source, as TVM takes it."""
        self.source = source
        return bytearray(self.gpu.module(self._change(source)))

    def compiled(self, function: Any, change: Callable[[str], str] = lambda source: source) -> Kernel:
        """A kernel, of a function with a GPU's binding; `change` may spoil its source."""
        self._change = change
        module = tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")})
        kernel: Kernel = tvm.compile(module, target=self._target)["kernel"]
        return kernel

    def run(self, kernel: Kernel, arrays: Sequence[Array], run: Run) -> list[Array]:
        """Call a kernel; return the arrays as it left them. Raises `EmulatorError` with what was found."""
        self.gpu.set(run)
        tensors = _on_device(arrays)
        try:
            kernel(*tensors)
        except Exception as error:
            found = self.gpu.error or str(error)[:500]  # TVM's holds the whole source
            raise EmulatorError(f"{found} ({run})") from None
        return [tensor.numpy() for tensor in tensors]

    def launch(
        self, source: str, blocks: int, cluster: int, threads: int, arrays: Sequence[Array], run: Run
    ) -> list[Array]:
        """Launch the kernel `k` of a CUDA source on arrays, in clusters of so many blocks; return them as it left them.

        Raises `EmulatorError` with what was found.
        """
        self.gpu.set(run)
        tensors = _on_device(arrays)
        pointers = [tensor.data_ptr() for tensor in tensors]
        self.gpu.launch(self.gpu.module(source), "k", blocks, cluster, threads, pointers)
        return [tensor.numpy() for tensor in tensors]

    def run_each(self, kernel: Kernel, arrays: Sequence[Array], runs: Sequence[Run]) -> list[Array]:
        """Call a kernel in several ways, which must give the same bits; return the arrays as each call left them.

        Raises `EmulatorError` if they do not.
        """
        first, *others = [self.run(kernel, arrays, run) for run in runs]
        for run, found in zip(runs[1:], others, strict=True):
            for i, (one, other) in enumerate(zip(first, found, strict=True)):
                if one.tobytes() != other.tobytes():
                    raise EmulatorError(f"parameter {i} has other bits if it runs {run} than {runs[0]}")
        return first


def _on_device(arrays: Sequence[Array]) -> list[Any]:
    return [tvm.runtime.tensor(np.ascontiguousarray(array), tvm.cuda(0)) for array in arrays]


def _replace_scratch(gpu: Gpu) -> None:
    """Let TVM's host code allocate memory of a launch sequence with the emulator's functions."""
    register = ctypes.CDLL(
        str(Path(import_ffi().__file__).parent / "lib" / "libtvm_ffi.so")
    ).TVMFFIEnvModRegisterContextSymbol
    for name, own in (
        ("__TVMBackendAllocWorkspace", gpu.driver.emulator_scratch),
        ("__TVMBackendFreeWorkspace", gpu.driver.emulator_scratch_end),
    ):
        if register(name.encode(), ctypes.cast(own, ctypes.c_void_p)) != 0:
            raise RuntimeError(f"{name} cannot be replaced")
