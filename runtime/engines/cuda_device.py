"""The first GPU of this machine, ready for work: TVM's runtime with its CUDA part, and one stream with its memory."""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.artifact.manifest import TensorSpec, WeightSpec
from runtime.artifact.targets import TARGETS
from runtime.artifact.tensor_file import bits_dtype
from runtime.engines.cuda_driver import Device as DriverDevice
from runtime.engines.cuda_driver import check_driver, read_driver
from runtime.engines.cuda_memory import CudaMemory
from runtime.engines.tvm_runtime import find_library, load_runtime


@dataclass(frozen=True)
class Device:
    """TVM's runtime, and one stream of the device with its memory."""

    description: DriverDevice
    ffi: Any
    memory: CudaMemory

    @classmethod
    def open(cls, archs: Sequence[str], threads: int) -> "Device":
        """Load the libraries; raises `UserError` if there is no driver, or no device that runs code for `archs`."""
        description = check_driver(read_driver(), archs)
        cuda_runtime, tvm_cuda = (str(find_library(name)) for name in TARGETS["cuda"].libraries)
        cudart = ctypes.CDLL(cuda_runtime, ctypes.RTLD_GLOBAL)
        ffi = load_runtime(threads)
        ctypes.CDLL(tvm_cuda, ctypes.RTLD_GLOBAL)  # needs the runtimes of TVM and of CUDA
        return cls(description, ffi, CudaMemory(cudart))

    def tensor(self, spec: WeightSpec | TensorSpec) -> Any:  # noqa: ANN401 (TVM's objects)
        """A new tensor on the device, uninitialized."""
        allocate = self.ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        return allocate(
            self.ffi.Shape(spec.shape), self.ffi.dtype(str(bits_dtype(spec.dtype))), self.ffi.device("cuda", 0), None
        )

    def on_stream(self) -> Any:  # noqa: ANN401
        """A context in which TVM's functions launch on the stream."""
        return self.ffi.use_raw_stream(self.ffi.device("cuda", 0), self.memory.stream)
