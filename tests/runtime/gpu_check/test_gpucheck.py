"""The GPU check without a GPU.

Its references judge the CUDA kernels in their serial form, and a stand-in for the CUDA runtime times them.
"""

import contextlib
import json
import shutil
import weakref
from dataclasses import replace
from types import SimpleNamespace

import msgspec
import numpy as np
import pytest

from build.compiler import tvm
from build.kernels.cuda.binding import SERIAL
from build.kernels.shapes import Embedding, Linear, Mixture, RollingAttention
from build.kernels.table import kernels_of
from build.packing.layout import packed_tensors
from build.shipping.keys import make_keys, sign
from build.tvm_stage.dispatch import dispatch
from build.tvm_stage.importer import import_graphs
from export.weights.format import ModelTensor, Storage
from export.weights.table import carry, format_of, load, store
from runtime.artifact.build_number import MINIMUM_VARIABLE
from runtime.artifact.folder import Artifact
from runtime.artifact.manifest import KernelCall, TargetSpec, TensorSpec, to_json
from runtime.artifact.rotary import QueryScaling
from runtime.artifact.signing import KEY_VARIABLE
from runtime.bench import DecodeSpeed, PrefillSpeed, Speeds, Workload
from runtime.engines import host
from runtime.engines.cuda_memory import CudaMemory
from runtime.errors import UserError
from runtime.gpu_check import kernel_timing, measurement
from runtime.gpu_check.findings import Findings
from runtime.gpu_check.folder import checked_manifest
from runtime.gpu_check.kernel_cases import case_of
from runtime.gpu_check.kernel_timing import CudaKernels, check_kernel
from runtime.gpu_check.measurement import driver_version, finding_of, tell
from runtime.gpu_check.packed_matrix import PackedMatrix
from runtime.gpu_check.random_tensors import Random, random_weights
from runtime.gpu_check.report import (
    Gpu,
    GpuLimits,
    KernelRow,
    ModelReport,
    Rivals,
    kernel_cells,
    label_of,
    speed_rows,
)
from runtime.gpu_check.torch_process import TorchTimes, TransformersTimes, products_of
from runtime.verify import Check
from tests.helpers.drivers import stub_driver, stub_nvml, stub_runtime
from tests.helpers.encoded import rows_for
from tests.helpers.kernels import aligned, call_of, compiled_serially, packed
from tests.helpers.serial import Host, HostDevice, compile_serial

CUDA_TARGET = TargetSpec(kind="cuda", dtype="fp32", cpu="x86-64-v3", cpu_features=(), arch=("sm_80",))
HALF_TARGET = msgspec.structs.replace(CUDA_TARGET, dtype="fp16")
SHAPES = {"linear": Linear, "embedding": Embedding, "rolling_attention": RollingAttention, "mixture": Mixture}


def serial(call):
    """A call's kernel in its serial form, with products for tensor cores."""
    arguments = (
        [msgspec.convert(argument, SHAPES[call.op]) for argument in call.arguments]
        if call.op in SHAPES
        else call.arguments
    )
    return compiled_serially(kernels_of(HALF_TARGET)[call.op](*arguments, on=SERIAL))


def calls_of(compile_case, name):
    """The kernels that a case would call on a GPU; no machine code is made."""
    return dispatch(import_graphs(compile_case(name).graphs), HALF_TARGET).calls


def mixture_call(tokens, dtype):
    """The call of a mixture's kernel."""
    return call_of("mixture", Mixture((1, tokens), 64, 48, 5, 2, Storage(dtype=dtype)))


OTHERS = [
    ("rms_norm", (2, 3), 100, 1e-5),
    ("swiglu", (1, 5), 33),
    ("residual", (2, 3, 40)),
    ("rotation", (2, 3), 16, "sin", 1.0),
    ("rotation", (2, 3), 16, "cos", 1.138629436111989),
]


@pytest.mark.parametrize("arguments", OTHERS, ids=lambda arguments: arguments[0])
def test_what_stands_beside_products_is_within_its_bound(arguments):
    call = call_of(*arguments)
    right = serial(call)
    assert 0 < check_kernel(call, right, Host(), half=True).error <= 1

    def scaled(tensors):
        tensors[-1].copyfrom(tensors[-1].numpy() * np.float32(1.01))

    assert check_kernel(call, wrong(right, scaled), Host(), half=True).error > 1


@pytest.mark.parametrize(("tokens", "dtype"), [(1, "int8"), (5, "float16"), (70, "int8")])
def test_a_mixture_is_within_its_bound(tokens, dtype):
    call = mixture_call(tokens, dtype)
    assert 0 < check_kernel(call, serial(call), Host(), half=True).error <= 1


def attention(rows, tokens, cache, query_scaling=None, slots=3, ring_len=112):
    """A window of 96 positions; a ring of 96 columns never wraps, unless each call adds one."""
    return RollingAttention(rows, tokens, 8, 2, 64, slots, 96, ring_len, cache, 0.125, query_scaling)


@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_queries_scaled_by_their_position_are_within_their_bound(tokens):
    """A kernel that leaves the factor out is not."""
    scaling = QueryScaling(beta=0.1, original_context=64)
    call, plain = (
        call_of("rolling_attention", attention(1, tokens, "float16", queries)) for queries in (scaling, None)
    )
    assert 0 < check_kernel(call, serial(call), Host(), half=True).error <= 1
    assert check_kernel(call, serial(plain), Host(), half=True).error > 1


@pytest.mark.parametrize("cache", ["float8_e4m3fn", "int8", "uint8"])
@pytest.mark.parametrize("tokens", [1, 3, 16])
def test_rounded_caches_are_within_their_bound(cache, tokens):
    """A kernel that reads or writes any of their tensors wrongly is not."""
    call = call_of("rolling_attention", attention(1, tokens, cache))
    right = serial(call)
    assert 0 < check_kernel(call, right, Host(), half=True).error <= 1
    for ring in range(5, len(call.parameters) - 1):

        def shifted(tensors, ring=ring):
            tensors[ring].copyfrom(np.roll(tensors[ring].numpy(), 1, axis=2))

        def read_elsewhere(*tensors, ring=ring):
            """Columns that the call has not written are another's while it attends, and right again afterwards."""
            before, positions = tensors[ring].numpy(), tensors[3].numpy().ravel()
            shifted(tensors, ring)
            right(*tensors)
            after, slot = before.copy(), tensors[4].numpy()[0]
            columns = positions[positions >= 0] % 112
            after[slot, :, columns] = tensors[ring].numpy()[slot, :, columns]
            tensors[ring].copyfrom(after)

        assert check_kernel(call, wrong(right, shifted), Host(), half=True).error > 1
        assert check_kernel(call, read_elsewhere, Host(), half=True).error > 1


# Rows of one slot, more rows than slots, rings that wrap and rings that hold all positions, and rows of padding.
@pytest.mark.parametrize(("rows", "slots", "ring_len"), [(2, 1, 112), (7, 3, 112), (4, 3, 96), (16, 8, 112)])
def test_rows_of_several_slots_are_within_their_bound(rows, slots, ring_len):
    """A kernel that takes a row's slot, or its place among the rows, for another's is not."""
    call = call_of("rolling_attention", attention(rows, 1, "float16", slots=slots, ring_len=ring_len))
    right = serial(call)
    positions, of_row = case_of(call, half=True).arrays[3:5]
    assert len(np.unique(of_row)) == min(slots, 1 + rows - -(-rows // 3))
    assert (positions < 0).sum() == (rows >= 16)
    assert len({*zip(of_row, positions[:, 0], strict=True)}) == rows
    assert len(np.unique(positions)) > rows // 2
    assert (positions.max() >= ring_len) == (ring_len > 96)
    assert 0 < check_kernel(call, right, Host(), half=True).error <= 1

    def changed(parameter):
        def call_wrongly(*tensors):
            kept = tensors[parameter].numpy()
            tensors[parameter].copyfrom(np.roll(kept, 1, axis=0))
            right(*tensors)
            tensors[parameter].copyfrom(kept)

        return check_kernel(call, call_wrongly, Host(), half=True).error

    assert changed(3) > 1  # positions
    assert slots == 1 or changed(4) > 1  # slots


@pytest.fixture(autouse=True)
def _few_copies(monkeypatch):
    monkeypatch.setattr(kernel_timing, "COLD_BYTES", 1)


def wrong(function, change):
    """A kernel whose results are changed afterwards."""

    def call(*tensors):
        function(*tensors)
        change(tensors)

    return call


@pytest.mark.parametrize("op", ["linear", "embedding", "rotation", "rolling_attention", "mixture"])
def test_a_wrong_kernel_is_seen(compile_case, op):
    """Results are slightly too large, a number is not written, or attention writes its ring one column too far."""
    call = (
        mixture_call(5, "int8")
        if op == "mixture"
        else next(call for call in calls_of(compile_case, "fp16") if call.op == op)
    )
    right, output = serial(call), case_of(call, half=True).output

    def scaled(tensors):
        tensors[output].copyfrom(tensors[output].numpy() * np.float32(1.01))

    def unwritten(tensors):
        array = tensors[output].numpy()
        array.flat[array.size // 2] = np.nan
        tensors[output].copyfrom(array)

    def shifted(tensors):
        tensors[5].copyfrom(np.roll(tensors[5].numpy(), 1, axis=2))

    def broken(tensors):
        tensors[5].copyfrom(np.full_like(tensors[5].numpy(), np.nan))

    for change in (scaled, unwritten, *([shifted, broken] if op == "rolling_attention" else [])):
        assert check_kernel(call, wrong(right, change), Host(), half=True).error > 1


@pytest.mark.parametrize(
    "stored", [Storage(dtype="float16"), Storage(dtype="int8"), Storage(dtype="int4", group_size=128)], ids=str
)
@pytest.mark.parametrize("rows", [1, 16])
def test_the_bound_of_a_long_sum_sees_what_is_left_out(stored, rows):
    """With the K of a 7B model's w2, the whole sum, in float32, is right, and without its last fiftieth it is not."""
    n, k = 32, 14336
    case = case_of(call_of("linear", Linear((1, rows), n, k, stored)), half=False)
    x, *parts, y = case.arrays
    matrix = PackedMatrix(n, k, stored.group_size, *parts).rows(0, 1).astype(np.float32)
    for kept, right in ((k, True), (k - k // 50, False)):
        found = [*case.arrays[:-1], (x[..., :kept] @ matrix[:, :kept].T).reshape(y.shape)]
        assert (case.error(found) <= 1) == right, kept


FORMATS = [
    Storage(dtype="float16"),
    Storage(dtype="int8"),
    Storage(dtype="int8", group_size=16, scales="float32"),
    Storage(dtype="int8", group_size=32, offsets="minimums"),
    Storage(dtype="int8", group_size=64, offsets="zero_points", scales="float32"),
    Storage(dtype="int4", group_size=32),
    Storage(dtype="int4", group_size=64, offsets="zero_points"),
    Storage(dtype="int4", group_size=32, offsets="minimums"),
    Storage(dtype="int4", group_size=128, offsets="zero_points", reordered=True),
    Storage(dtype="float8"),
    Storage(dtype="float8", group_size=128, scales="float32"),
]


def matrix_of(stored, n, k, parts):
    """Arrays in the order of `packed_tensors`, as a matrix that knows what they are."""
    names = ["w", *(["s"] if len(parts) > 1 else []), *(["z"] if stored.offsets != "none" else [])]
    names += ["order"] if stored.reordered else []
    return PackedMatrix(n, k, stored.group_size, **dict(zip(names, parts, strict=True)))


@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_packed_matrices_are_read_as_they_were_packed(stored):
    """Compare with `export.weights` and `build.packing.layout`, which write them.

    They round each number times its scale, and that plus a minimum, to float32.
    """
    n, k = 70, 160
    tensor = ModelTensor(name="w", shape=(n, k), stored=stored)
    arrays = (
        carry(tensor, rows_for(stored, n, k))
        if format_of(stored).scaled
        else store(tensor, np.random.default_rng(0).standard_normal((n, k)).astype(np.float32))
    )
    matrix = matrix_of(stored, n, k, packed(tensor, arrays, "cuda"))
    found = np.concatenate([matrix.rows(0, 2), matrix.rows(2, 3)])
    assert np.all(np.abs(found - load(tensor, arrays)) <= 2**-23 * matrix.terms(0, 3))


@pytest.mark.parametrize("stored", FORMATS, ids=str)
@pytest.mark.parametrize("rows", [1, 16])
def test_products_of_every_storage_are_within_their_bound(stored, rows):
    """Without 64 of the 2048 columns of x, they are not."""
    call = call_of("linear", Linear((1, rows), 70, 2048, stored))
    right = serial(call)
    assert 0 < check_kernel(call, right, Host(), half=True).error <= 1

    def cut(*tensors):
        x = tensors[0].numpy()
        x[..., 960:1024] = 0
        right(tvm.runtime.tensor(x), *tensors[1:])

    assert check_kernel(call, cut, Host(), half=True).error > 1


@pytest.mark.parametrize("eps", [None, 1e-5])
def test_a_product_of_one_token_is_within_its_bound(eps):
    """One of another token is not."""
    call = call_of("linear", Linear((1, 1), 70, 96, Storage(dtype="int8"), one_of=5, norm_eps=eps))
    right = serial(call)
    assert 0 < check_kernel(call, right, Host(), half=True).error <= 1

    def of_another(*tensors):
        right(tvm.runtime.tensor(np.roll(tensors[0].numpy(), 1, axis=1)), *tensors[1:])

    assert check_kernel(call, of_another, Host(), half=True).error > 1


@pytest.mark.parametrize("stored", [stored for stored in FORMATS if stored.offsets == "minimums"], ids=str)
def test_embeddings_with_minimums_are_within_their_bound(stored):
    call = call_of("embedding", Embedding((1, 5), 70, 160, stored))
    assert check_kernel(call, serial(call), Host(), half=True).error <= 1


@pytest.mark.parametrize("stored", FORMATS, ids=str)
def test_random_weights_have_the_size_of_a_models(stored):
    n, k = 64, 256
    specs = [part.spec for part in packed_tensors(ModelTensor(name="w", shape=(n, k), stored=stored), 1, "cuda")]
    found = random_weights(specs)
    assert {name: (array.shape, str(array.dtype)) for name, array in found.items()} == {
        spec.name: (spec.shape, spec.dtype) for spec in specs
    }
    parts = [found[spec.name] for spec in specs]
    rows = matrix_of(stored, n, k, parts).rows(0, 2)
    assert 0.5 * k**-0.5 < rows.std() < 2 * k**-0.5


def test_a_sample_has_both_ends():
    assert Random(0).sample(1, 8) == [0]
    assert Random(0).sample(2, 8) == [0, 1]
    found = Random(0).sample(100, 8)
    assert (len(found), found[0], found[-1]) == (8, 0, 99)


class StubDevice:
    """`runtime.engines.cuda_device.Device` over this machine's memory.

    A copy must be from and to tensors that still exist.
    """

    def __init__(self, library):
        self.library = library
        self.memory = CudaMemory(library)
        self.on_stream = contextlib.nullcontext
        self.alive = weakref.WeakValueDictionary()
        on_device = self.memory.on_device
        self.memory.on_device = lambda to, source, nbytes: (
            self.alive[to] and self.alive[source] and on_device(to, source, nbytes)
        )

    def tensor(self, spec):
        made = StubTensor(spec)
        self.alive[made.data_ptr()] = made
        return made


class StubTensor:
    def __init__(self, spec):
        self.array = np.zeros(spec.shape, spec.dtype)

    def data_ptr(self):
        return self.array.ctypes.data


def test_kernels_are_timed_in_a_graph_that_takes_copies_in_turn(tmp_path):
    device = StubDevice(stub_runtime(tmp_path))
    kernels = CudaKernels(device)
    tensor = kernels.upload(np.arange(6, dtype=np.float32).reshape(2, 3))
    spec = TensorSpec(name="x", shape=(2, 3), dtype="float32")
    for same in (tensor, kernels.copy(tensor, spec)):
        np.testing.assert_array_equal(kernels.download(same, spec), np.arange(6).reshape(2, 3))
    seen = []
    kernels.run(seen.append, [tensor])
    assert seen == [tensor]
    seen.clear()
    seconds = kernels.seconds(
        lambda which: seen.append((device.library.is_capturing(), which)), [["a"], ["b"], ["c"]], 66
    )
    assert [which for _, which in seen[:4]] == ["a", "b", "c", "a"]
    assert {capturing for capturing, _ in seen} == {1}
    assert len(seen) == 66
    assert seconds == pytest.approx(0.003 / 66)  # one launch of the graph, by the stand-in's clock
    assert device.library.count_launches() == 4
    assert kernels.copy_gb_s(3 * 10**6) == pytest.approx(2.0)


def test_a_capture_that_fails_says_what_failed(tmp_path):
    """The message says so, and not that the capture failed."""
    memory = CudaMemory(stub_runtime(tmp_path))

    def failing():
        raise ValueError("the launch")

    with pytest.raises(ValueError, match="the launch"):
        memory.record(failing)


@pytest.fixture
def serial_folder(compile_case, tmp_path):
    """A check folder whose library holds the kernels in their serial form."""
    manifest = compile_serial(compile_case("windowed").graphs, tmp_path)
    (tmp_path / "manifest.json").write_bytes(to_json(msgspec.structs.replace(manifest, target=CUDA_TARGET)))
    (tmp_path / "weights.safetensors").unlink()
    return tmp_path


@pytest.fixture
def measured(serial_folder, tmp_path_factory, monkeypatch, capsys):
    """What a part of the measurement finds on the folder, as on a GPU, except that the device is this machine."""
    device = HostDevice(stub_runtime(tmp_path_factory.mktemp("stub")))
    monkeypatch.setattr("runtime.engines.cuda_device.Device.open", lambda _archs, threads: device)
    monkeypatch.setattr("runtime.engines.cuda.load_library", load_here)
    monkeypatch.setattr(measurement, "WORKLOAD", Workload((8, 20), (8,), 2, 1))

    def measured(part, *options):
        assert measurement.main([part, str(serial_folder), *options]) == 0
        return list(filter(None, map(finding_of, capsys.readouterr().out.splitlines())))

    return measured


def test_a_folder_is_measured_whole(measured, serial_folder):
    """Kernels from the library, random weights, verify, speeds."""
    calls = checked_manifest(serial_folder).calls
    kernels = measured("kernels")
    assert [(name, row.kernel) for name, row in kernels] == [("kernel", call.kernel) for call in calls]
    assert all(row.ok and row.seconds > 0 for _, row in kernels)
    assert [row.kernel for _, row in measured("kernels", "--first", "2")] == [call.kernel for call in calls[2:]]
    assert measured("launches") == [("launched", len(calls))]
    (_, checks), (_, speeds) = measured("model")
    assert all(check.ok for check in checks)
    assert ([p.prompt_tokens for p in speeds.prefill], [d.context for d in speeds.decode]) == ([8, 20], [8])


def test_a_model_that_disagrees_with_itself_is_not_timed(measured, monkeypatch):
    monkeypatch.setattr(measurement, "verify", lambda _engine: (Check("prefill", "far apart", "less", ok=False),))
    assert [name for name, _ in measured("model")] == ["checks"]


@pytest.mark.parametrize("line", ["", "[12:00:00] a warning", "{}", "{a warning}", '{"level": "warning"}'])
def test_what_a_library_says_is_no_finding(line):
    assert finding_of(line) is None


def test_a_finding_has_a_line_of_its_own_behind_half_a_line(capsys):
    print("a warning, ", end="")
    tell("launched", 3)
    assert [finding_of(line) for line in capsys.readouterr().out.splitlines()] == [None, ("launched", 3)]


def load_here(_device, manifest, library, arrays):
    weights = {name: aligned(array) for name, array in arrays.items()}
    opened = SimpleNamespace(manifest=manifest, sealed_library=lambda _level: library, weights=lambda: weights)
    return host.load(opened, threads=1)


@pytest.fixture
def cuda_artifact(compile_case):
    return compile_case("cuda").artifact


def test_an_artifact_names_its_kernels(cuda_artifact):
    manifest = checked_manifest(cuda_artifact)
    used = {row.kernel.removesuffix("_kernel").partition("_kernel_")[0] for row in manifest.kernels}
    assert {call.kernel for call in manifest.calls} <= used
    # wqkv, wo, w13, w2, head
    assert sum(call.calls.get("step_1", 0) for call in manifest.calls if call.op == "linear") == 5
    products = products_of(manifest, 2048)
    name = manifest.name
    assert {(p.graph, p.rows) for p in products} == {
        (f"{name} decode", 1),
        (f"{name} prefill", 2048),
        (f"{name} prefill", 1),
    }
    assert random_weights(manifest.weights).keys() == {spec.name for spec in manifest.weights}


def test_other_folders_are_refused(compile_case, tmp_path):
    with pytest.raises(UserError, match=r"is not an artifact: it has no manifest\.json"):
        checked_manifest(tmp_path)
    artifact = compile_case("windowed").artifact
    manifest = msgspec.structs.replace(Artifact.open(artifact).manifest, target=CUDA_TARGET)
    (tmp_path / "manifest.json").write_bytes(to_json(msgspec.structs.replace(manifest, files=())))
    (tmp_path / "library.so").write_bytes(b"planted")
    with pytest.raises(UserError, match=r"lists no library\.so"):
        checked_manifest(tmp_path)
    (tmp_path / "manifest.json").write_bytes(to_json(manifest))
    with pytest.raises(UserError, match=r"library\.so is damaged"):
        checked_manifest(tmp_path)
    shutil.copyfile(artifact / "library.so", tmp_path / "library.so")
    with pytest.raises(UserError, match="names no kernel, expected those that the library calls"):
        checked_manifest(tmp_path)
    with pytest.raises(UserError, match="is for the target llvm, expected cuda"):
        checked_manifest(compile_case("windowed").artifact)


def test_a_signature_is_required_where_the_environment_does(cuda_artifact, tmp_path, monkeypatch):
    """As by every other command: a check runs the library's code too."""
    private, public = make_keys(tmp_path / "keys")
    signed = shutil.copytree(cuda_artifact, tmp_path / "artifact")
    monkeypatch.setenv(KEY_VARIABLE, str(public))
    with pytest.raises(UserError, match="is not signed, but a signature by"):
        checked_manifest(signed)
    sign(signed, private)
    assert checked_manifest(signed).calls
    monkeypatch.setenv(MINIMUM_VARIABLE, "1")
    with pytest.raises(UserError, match="has build number 0, but 1 or newer is required"):
        checked_manifest(signed)


def test_without_a_driver_it_says_so(cuda_artifact, monkeypatch):
    monkeypatch.setattr("runtime.engines.cuda_driver.DRIVER", "libcuda-absent.so.1")
    with pytest.raises(UserError, match="no CUDA driver found"):
        measurement.main(["gpu", str(cuda_artifact)])


def test_the_driver_has_the_version_that_nvidia_smi_shows(tmp_path, monkeypatch):
    monkeypatch.setattr(measurement, "NVML", stub_nvml(tmp_path, "580.159.04"))
    assert driver_version() == "580.159.04"
    monkeypatch.setattr(measurement, "NVML", "libnvidia-ml-absent.so.1")
    monkeypatch.setattr("runtime.engines.cuda_driver.DRIVER", stub_driver(tmp_path, version=13010))
    assert driver_version() == "for CUDA 13.1"


KERNEL = KernelRow("linear_0", "1 x 4096 -> 4096 int8", "step_1", 0.25, 1e-5, 2 * 10**7, 10**8, cold=True)
SLOW = KernelRow("linear_1", "512 x 4096 -> 4096 int8", "prefill_512", 3.0, 1e-3, 2 * 10**7, 2 * 10**10, cold=True)


def report(*kernels, ok=True):
    speeds = Speeds((PrefillSpeed(2048, 0.1, 20480),), (DecodeSpeed(64, 0.005, 200, 10**10, 2000),), ())
    return ModelReport("7b", kernels, (Check("prefill", "0 apart", "less", ok),), speeds)


def test_the_tables():
    limits = GpuLimits(4000.0, 400.0)
    assert (
        " ".join(kernel_cells(KERNEL, limits))
        == "0.25 10.0 2,000 10.00 50% of copy linear_0 1 x 4096 -> 4096 int8 step_1"
    )
    assert kernel_cells(SLOW, limits)[:5] == ("3 WRONG", "1,000.0", "20", "20.00", "5% of peak")
    assert limits.share(replace(KERNEL, cold=False)) == "in cache"
    assert GpuLimits(4000.0, None).share(SLOW) == "0% of copy"
    rivals = Rivals(
        TorchTimes(400.0, {"7b decode": 0.004, "7b prefill": 0.05}),
        TransformersTimes({2048: 0.2}, {64: 0.01}, graph=True),
    )
    decode, prefill = speed_rows(report(KERNEL), limits, rivals)
    assert (
        decode[-1] == "50% of copy, 1.25 of the time of torch's products alone, 0.50 of the time of transformers' graph"
    )
    assert prefill[-1] == "2.00 of the time of torch's products alone, 0.50 of the time of transformers"
    assert [row[-1] for row in speed_rows(report(KERNEL), limits, Rivals())] == ["50% of copy", ""]
    plain = Rivals(transformers=TransformersTimes({}, {64: 0.01}, graph=False))
    assert "of transformers without a graph" in speed_rows(report(KERNEL), limits, plain)[0][-1]


def test_one_wrong_kernel_or_check_makes_it_wrong():
    assert report(KERNEL).ok
    assert not report(KERNEL, SLOW).ok
    assert not report(KERNEL, ok=False).ok
    assert not report(replace(KERNEL, error=float("nan"))).ok


def test_json_has_no_infinite_numbers():
    wrong = report(KERNEL, replace(SLOW, error=float("inf")))
    found = json.loads(Findings("today", {"7b": wrong}, Gpu("a GPU", "580", 4000.0)).model_as_json("7b"))
    assert [(row["error"], row["ok"]) for row in found["kernels"]] == [(0.25, True), (None, False)]
    assert (found["kernels"][0]["gb_s"], found["copy_gb_s"], found["ok"]) == (pytest.approx(2000.0), 4000.0, False)


def test_labels():
    call = KernelCall(
        kernel="rms_norm_0", op="rms_norm", arguments=([1, 4], 64, 1e-5), parameters=(), calls={}, bytes=0, flops=0
    )
    assert label_of(call) == "4 x 64"
