"""The CUDA engine's own part: copies, captured graphs, and refusals.

The device of the runtime library is this machine's memory.
"""

import contextlib

import numpy as np
import pytest

from runtime.artifact.folder import Artifact
from runtime.artifact.manifest import COLUMN, IDS, POSITIONS, SLOTS, Function, Signature, TensorSpec
from runtime.artifact.targets import TARGETS
from runtime.engines import cuda_device, cuda_driver, cuda_memory
from runtime.engines.cuda import check_memory
from runtime.engines.cuda_device import Device
from runtime.engines.cuda_function import GraphFunction
from runtime.engines.cuda_memory import CudaMemory
from runtime.engines.engine import Engine
from runtime.engines.loaded_artifact import PROCESS_BYTES, device_bytes
from runtime.engines.tvm_runtime import find_library
from runtime.errors import UserError
from tests.helpers.artifacts import rings_of
from tests.helpers.drivers import stub_driver, stub_runtime

TOKENS, VOCAB = 3, 5


@pytest.fixture
def library(tmp_path):
    return stub_runtime(tmp_path)


def test_uploads_are_whole_whatever_the_stage(library, monkeypatch):
    monkeypatch.setattr(cuda_memory, "STAGE_BYTES", 100)
    generator = np.random.default_rng(0)
    arrays = [
        generator.integers(0, 99, 1).astype(np.int64),
        generator.standard_normal((7, 11)).astype(np.float16),
        np.arange(50, dtype=np.int16),
    ]
    targets = [np.zeros_like(array) for array in arrays]
    counted = []
    memory = CudaMemory(library)
    memory.upload([(target.ctypes.data, array) for target, array in zip(targets, arrays, strict=True)], counted.append)
    assert all(np.array_equal(target, array) for target, array in zip(targets, arrays, strict=True))
    memory.drop_stages()
    memory.upload([(targets[0].ctypes.data, arrays[0] + 1)], lambda _nbytes: None)
    assert np.array_equal(targets[0], arrays[0] + 1)
    assert counted == [8, 100, 54, 100]


def test_downloads_are_whole_whatever_the_stage(library, monkeypatch):
    monkeypatch.setattr(cuda_memory, "STAGE_BYTES", 100)
    generator = np.random.default_rng(0)
    sources = [generator.standard_normal((7, 11)).astype(np.float16), *np.arange(300, dtype=np.int16).reshape(2, 150)]
    found = [np.zeros_like(source) for source in sources]
    memory = CudaMemory(library)
    for _ in range(2):
        memory.download((source.ctypes.data, array) for source, array in zip(sources, found, strict=True))
        assert all(np.array_equal(array, source) for array, source in zip(found, sources, strict=True))
        sources[0][...] += 1
    memory.drop_stages()


def test_the_stand_in_is_as_late_as_a_device_can_be(library):
    """A copy arrives once the host waits for the stream, or for a mark behind it, and not before."""
    memory = CudaMemory(library)
    device, first, second = np.arange(3), np.zeros(3, int), np.zeros(3, int)
    mark = memory.event()
    memory.wait_for(mark)  # not set yet
    memory.to_host(first, device.ctypes.data)
    memory.mark(mark)
    memory.to_host(second, device.ctypes.data)
    assert (first.any(), second.any()) == (False, False)
    memory.wait_for(mark)
    assert (first.any(), second.any()) == (True, False)
    memory.wait()
    assert second.any()


def test_a_failure_is_one_sentence(library):
    library.set_failing(100)
    with pytest.raises(UserError, match=r"cudaStreamCreateWithFlags failed with error 100 \(no device\)"):
        CudaMemory(library)


class Tensor:
    """A tensor on the stub's device."""

    def __init__(self, array):
        self.array = array

    def data_ptr(self):
        return self.array.ctypes.data


class Ffi:
    """The part of tvm_ffi that a call needs."""

    def __init__(self, library):
        self.library = library
        self.streams = []

    def get_global_func(self, _name):
        return lambda shape, dtype, device, _scope: Tensor(np.zeros(shape, dtype))

    def use_raw_stream(self, device, stream):
        self.streams.append(stream)
        self.library.run_queued()
        return contextlib.nullcontext()

    Shape = tuple
    dtype = staticmethod(np.dtype)
    device = staticmethod(lambda *name: name)


def test_a_call_runs_then_is_captured_then_launched(library):
    """The first call runs the function, the second records and launches it, and later calls only launch it.

    Each call reads ids and brings outputs back.
    """
    shapes = {IDS: (1, TOKENS), POSITIONS: (1, TOKENS), SLOTS: (1,), COLUMN: (1,)}
    inputs = tuple(TensorSpec(name=name, shape=shape, dtype="int64") for name, shape in shapes.items())
    ring = TensorSpec(name="past_key_values.0.key", shape=(2, 1, 16, 4), dtype="float32")
    out = TensorSpec(name="logits", shape=(1, 1, VOCAB), dtype="float32")
    signature = Signature(inputs=(*inputs, ring), outputs=(out,))
    described = Function(name="prefill_3", rows=1, tokens=TOKENS, signature=signature)
    seen, output = [], Tensor(np.zeros((1, 1, VOCAB), np.float32))

    def function(*tensors):
        given, rest = tensors[: len(inputs)], tensors[len(inputs) :]
        seen.append((library.is_capturing(), [tensor.array.tolist() for tensor in given], rest))
        return output

    ffi = Ffi(library)
    devices = []
    ffi.get_global_func = lambda _name: (
        lambda shape, dtype, *_: devices.append(Tensor(np.zeros(shape, dtype))) or devices[-1]
    )
    call = GraphFunction(Device(None, ffi, CudaMemory(library)), function, described, ["caches"])
    assert list(call.inputs) == list(shapes)
    for turn in range(4):
        for i, array in enumerate(call.inputs.values()):
            array[...] = 10 * i + turn
        output.array[...] = 100 + turn
        assert (call() == 100 + turn).all()
        on_device = [tensor.array.tolist() for tensor in devices]
        assert on_device == [[[turn] * TOKENS], [[10 + turn] * TOKENS], [20 + turn], [30 + turn]]
    assert [capturing for capturing, *_ in seen] == [0, 1]
    assert seen[0][1:] == ([[[0] * TOKENS], [[10] * TOKENS], [20], [30]], ("caches",))
    assert library.count_launches() == 3
    assert set(ffi.streams) == {1}


def test_what_does_not_fit_is_refused_with_numbers():
    check_memory(8 * 10**9, 8 * 10**9)
    with pytest.raises(UserError, match=r"the GPU has 8\.0 GB free, but weights, caches and workspace take 8\.2 GB"):
        check_memory(8_200_000_000, 8 * 10**9)


def test_a_model_takes_its_weights_caches_and_a_little(compile_case):
    manifest = Artifact.open(compile_case("fp16").artifact).manifest
    stored = sum(array.nbytes for array in Artifact.open(compile_case("fp16").artifact).weights().values())
    caches = sum(ring.nbytes for ring in rings_of(Engine.open(compile_case("fp16").artifact, threads=1)))
    assert 0 < device_bytes(manifest) - stored - caches - PROCESS_BYTES < 10**6


@pytest.mark.parametrize("name", TARGETS["cuda"].libraries)
def test_libraries_are_found_on_a_compile_host(name):
    assert find_library(name).is_file()


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(UserError, match=r"libabsent\.so was not found in .*lib; use the runtime folder"):
        find_library("libabsent.so")


@pytest.fixture
def artifact(compile_case):
    return compile_case("cuda").artifact


def test_a_machine_without_a_driver_is_told_so(artifact, monkeypatch):
    monkeypatch.setattr(cuda_driver, "DRIVER", "libcuda-absent.so.1")
    with pytest.raises(UserError, match=r"no CUDA driver found: .* install NVIDIA's driver"):
        Engine.open(artifact)


def test_another_gpu_is_refused_before_anything_is_loaded(artifact, monkeypatch, tmp_path):
    monkeypatch.setattr(cuda_driver, "DRIVER", stub_driver(tmp_path, major=7, minor=5))
    monkeypatch.setattr(cuda_device, "find_library", None)  # loading it would fail
    with pytest.raises(UserError, match="is sm_75, but the artifact has machine code for sm_80, sm_90a"):
        Engine.open(artifact)
