"""A model made of the CUDA kernels in their serial form, compiled for the CPU.

It exercises the GPU's graph, packing and calls on a machine without a GPU.
"""

import contextlib
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from build.compiler import tvm
from build.kernels.cuda.binding import SERIAL
from build.kernels.table import Kernels, kernels_of
from build.packing.layout import packed_tensors
from build.packing.pack import pack_weights, packed, packed_weights
from build.pipeline import CALLS_FILE, build_library
from build.tvm_stage import dispatch
from build.tvm_stage.target import target_spec
from export.configuration.config import BackendConfig
from export.onnx_graphs.graphs import OnnxGraphs
from runtime.artifact.consistency import LIBRARY_FILE, WEIGHTS_FILE
from runtime.artifact.hashing import file_entry
from runtime.artifact.manifest import SCHEMA_VERSION, KernelCall, Manifest, TargetSpec
from runtime.artifact.tensor_file import TensorFile
from runtime.engines import host
from runtime.engines.cuda_memory import CudaMemory
from runtime.engines.engine import Engine
from runtime.engines.tvm_runtime import load_runtime


def serial_kernels(target: TargetSpec) -> Kernels:
    """The GPU kernels for a target's dtype, in their serial form."""
    kernels = kernels_of(msgspec.structs.replace(target, kind="cuda"))
    return {op: partial(maker, on=SERIAL) for op, maker in kernels.items()}


def compile_serial(graphs: OnnxGraphs, folder: Path, dtype: str = "fp32") -> Manifest:
    """Fill `folder` with the library and with weights packed as for a GPU; return the manifest.

    The manifest's target is this machine.
    """
    spec = target_spec(BackendConfig(target="llvm", dtype=dtype))
    record = graphs.record
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "kernels_of", serial_kernels)
        patch.setattr(
            dispatch, "packed_tensors", lambda tensor, n_experts, _kind: packed_tensors(tensor, n_experts, "cuda")
        )
        patch.setattr(dispatch, "packed_weights", lambda record, _kind: packed_weights(record, "cuda"))
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
        graphs=record.graphs,
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
        SimpleNamespace(manifest=manifest, sealed_library=lambda: folder / LIBRARY_FILE, weights=lambda: mapped),
        threads=2,
    )
    return Engine(manifest, folder, loaded)


class HostDevice:
    """`runtime.engines.cuda_device.Device` with TVM's own tensors in this machine's memory."""

    def __init__(self, memory: CudaMemory) -> None:
        self.description = SimpleNamespace(name="this machine")
        self.ffi = load_runtime(1)
        self.memory = memory
        self.on_stream = contextlib.nullcontext

    def tensor(self, spec):
        allocate = self.ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        return allocate(self.ffi.Shape(spec.shape), self.ffi.dtype(spec.dtype), self.ffi.device("cpu", 0), None)


class ReplayMemory(CudaMemory):
    """A stand-in whose graphs are the function to be recorded: launching a graph runs it."""

    def record(self, run):
        return run

    def launch(self, graph):
        graph()


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
