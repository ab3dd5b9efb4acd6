"""A model made of the CUDA kernels in their serial form, compiled for the CPU.

It exercises the GPU's graph, packing and calls on a machine without a GPU.
"""

import contextlib
import ctypes
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from build.compiler import llvm_target, tvm
from build.kernels.cuda.binding import SERIAL
from build.kernels.table import Kernels, kernels_of
from build.packing.layout import packed_tensors
from build.packing.pack import pack_weights, packed, packed_weights
from build.pipeline import CALLS_FILE, build_library
from build.tvm_stage import dispatch, target
from build.tvm_stage.target import target_spec
from export.configuration.config import BackendConfig
from export.onnx_graphs.graphs import OnnxGraphs
from runtime.artifact.consistency import LIBRARY_FILE, WEIGHTS_FILE
from runtime.artifact.hashing import file_entry
from runtime.artifact.manifest import SCHEMA_VERSION, KernelCall, Manifest, TargetSpec
from runtime.artifact.tensor_file import TensorFile
from runtime.engines import cuda, host
from runtime.engines.cuda_memory import CudaMemory
from runtime.engines.engine import Engine
from runtime.engines.loaded_artifact import LoadedArtifact
from runtime.engines.tvm_runtime import CPU_DEVICE, load_runtime, start_machine
from tests.helpers.artifacts import ONE_LEVEL
from tests.helpers.drivers import stub_runtime
from tests.helpers.kernels import NOT_OPTIMIZED


def serial_kernels(target: TargetSpec) -> Kernels:
    """The GPU kernels for a target's dtype, in their serial form."""
    kernels = kernels_of(msgspec.structs.replace(target, kind="cuda"))
    return {op: partial(maker, on=SERIAL) for op, maker in kernels.items()}


def compile_serial(graphs: OnnxGraphs, folder: Path, dtype: str = "fp32") -> Manifest:
    """Fill `folder` with the library and with weights packed as for a GPU; return the manifest.

    The manifest's target is this machine.
    """
    spec = target_spec(BackendConfig(target="llvm", cpu=(ONE_LEVEL,), dtype=dtype))
    record = graphs.record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "kernels_of", serial_kernels)
        patch.setattr(
            dispatch, "packed_tensors", lambda tensor, n_experts, _kind: packed_tensors(tensor, n_experts, "cuda")
        )
        patch.setattr(dispatch, "packed_weights", lambda record, _kind: packed_weights(record, "cuda"))
        patch.setattr(target, "llvm_target", partial(llvm_target, **NOT_OPTIMIZED))
        build_library(graphs, spec, folder, dump=None)
    pack_weights(graphs.weights(), packed(record, "cuda"), folder / WEIGHTS_FILE, 1)
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name="serial",
        build_key="0",
        model=record.model,
        shape=record.shape,
        quantization=record.quantization,
        target=spec,
        functions=record.functions,
        weights=packed_weights(record, "cuda"),
        tokenizer=None,
        overrides={},
        tools={},
        files=(file_entry(folder / LIBRARY_FILE),),
        calls=msgspec.json.decode((folder / CALLS_FILE).read_bytes(), type=tuple[KernelCall, ...]),
    )


def serial_engine(manifest: Manifest, folder: Path, weights=None) -> Engine:
    """An engine on that folder, with the folder's weights or others."""
    mapped = weights or TensorFile.open(folder / WEIGHTS_FILE).map()
    loaded = host.load(
        SimpleNamespace(manifest=manifest, sealed_library=lambda _level: folder / LIBRARY_FILE, weights=lambda: mapped),
        threads=2,
    )
    return _engine(manifest, folder, loaded)


def _engine(manifest: Manifest, folder: Path, loaded: LoadedArtifact) -> Engine:
    """An engine that expects of its functions what is expected of a GPU's."""
    target = msgspec.structs.replace(manifest.target, kind="cuda")
    return Engine(msgspec.structs.replace(manifest, target=target), folder, loaded)


class HostDevice:
    """`runtime.engines.cuda_device.Device` with TVM's own tensors in this machine's memory, on `stub_runtime`."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.description = SimpleNamespace(name="this machine")
        self.ffi = load_runtime(1)
        self.library = library
        self.memory = ReplayMemory(library)

    def tensor(self, spec):
        allocate = self.ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        return allocate(self.ffi.Shape(spec.shape), self.ffi.dtype(spec.dtype), self.ffi.device("cpu", 0), None)

    def on_stream(self):
        """Kernels run at once, after what was started before them."""
        self.library.run_queued()
        return contextlib.nullcontext()


class Replay:
    """A recorded graph: the function to call, which recording has called once already."""

    def __init__(self, run: Callable[[], object]) -> None:
        self.work = ctypes.CFUNCTYPE(None)(run)
        self.is_launched = False


class ReplayMemory(CudaMemory):
    """A stand-in whose graphs are the function to be recorded: launching a graph queues it.

    Recording one calls it, since that is how its output gets a place; the launch that follows finds this done.
    """

    def record(self, run):
        run()
        return Replay(run)

    def launch(self, graph):
        if graph.is_launched:
            super().launch(graph.work)
        graph.is_launched = True

    def forget(self, graph):
        """Nothing to free."""


class FixedOutputs:
    """A virtual machine whose functions return the same tensor each time, as a recorded graph does."""

    def __init__(self, machine: Any) -> None:
        self.machine = machine

    def __getitem__(self, name: str) -> Callable[..., Any]:
        function, kept = self.machine[name], []

        def call(*arguments: Any) -> Any:
            output = function(*arguments)
            if kept:
                ctypes.memmove(kept[0].data_ptr(), output.data_ptr(), np.from_dlpack(output).nbytes)
            else:
                kept.append(output)
            return kept[0]

        return call


def stub_engine(manifest: Manifest, folder: Path, weights=None) -> Engine:
    """The CUDA engine on a folder of `compile_serial`, over `stub_runtime`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "start_machine", lambda library, *_: FixedOutputs(start_machine(library, CPU_DEVICE)))
        loaded = cuda.load_library(
            HostDevice(stub_runtime(folder)),
            manifest,
            folder / LIBRARY_FILE,
            weights or TensorFile.open(folder / WEIGHTS_FILE).map(),
        )
    return _engine(manifest, folder, loaded)


class Host:
    """This machine as a device for `runtime.gpucheck.check_kernel`."""

    def upload(self, array):
        return tvm.runtime.tensor(array)

    def download(self, tensor, spec):
        array = tensor.numpy()
        assert (array.shape, str(array.dtype)) == (spec.shape, spec.dtype)
        return array

    def run(self, function, tensors):
        function(*tensors)

    def copy(self, tensor, spec):
        return self.upload(self.download(tensor, spec))

    def seconds(self, function, sets, calls):
        start = time.perf_counter()
        function(*sets[-1])
        return time.perf_counter() - start
