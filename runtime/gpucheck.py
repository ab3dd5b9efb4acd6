"""`python -m runtime.gpucheck FOLDER ...`: is every kernel of a CUDA library right on this GPU, and how near to its limits does it run?

A folder holds a manifest and a library: an artifact, or what `make gpucheck` has compiled of a model's sizes without its weights. Weights are
random and made here, from a seed. Each kernel runs by itself, and its outputs are compared with a reference in float64 (`runtime.kernel_cases`).
Then it is timed: a captured graph launches it many times, on several copies of its weights, so that they come from memory and not from a cache.
Last the whole model runs: the same ids three ways (`runtime.verify`), and its speed (`runtime.bench`). Where some Python of this machine has
torch, the matrix products and the matrix peak are measured with that too, in a process of its own.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.aligned import aligned
from runtime.bench import Speeds, Workload, measure, step_bytes_of
from runtime.consistency import LIBRARY_FILE, MANIFEST_FILE
from runtime.errors import UserError, run_command
from runtime.kernel_cases import KernelCase, case_of, random_weights
from runtime.manifest import KernelCall, Manifest, TensorSpec, decode
from runtime.tensor_file import numpy_dtype, tensor_bytes
from runtime.torch_limits import Product, TorchTimes, ask_torch
from runtime.verify import Check, verify

Array = NDArray[Any]

COLD_BYTES = 256 * 2**20  # of copies of a kernel's weights, several times the second-level cache of any GPU
MOST_COPIES = 64
LAUNCHES, PASSES = 64, 5  # of a kernel in one graph, and how often the graph is timed
COMPUTE_BOUND = 50  # operations a byte, above which operations are what counts
WORKLOAD = Workload(prompt_tokens=(128, 512, 2048), contexts=(64, 2048), steps=64, repeats=5)


class KernelDevice(Protocol):
    """What a kernel is called on and timed with."""

    def upload(self, array: Array) -> Any:  # noqa: ANN401 (tensors of a runtime)
        """A tensor with the array's numbers."""

    def download(self, tensor: Any, spec: TensorSpec) -> Array:  # noqa: ANN401
        """A tensor's numbers."""

    def run(self, function: Callable[..., Any], tensors: Sequence[Any]) -> None:
        """Call a kernel and wait for it."""

    def seconds(self, function: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> float:
        """Time of one call, over calls that take one set of tensors after the other."""


@dataclass(frozen=True)
class KernelRow:
    """One kernel: its largest error as a share of the bound, and its speed."""

    kernel: str
    label: str
    graphs: str
    error: float
    seconds: float
    bytes: int
    flops: int

    @property
    def gb_s(self) -> float:
        """GB/s of the least memory traffic."""
        return self.bytes / self.seconds / 1e9

    @property
    def tflop_s(self) -> float:
        """TFLOP/s."""
        return self.flops / self.seconds / 1e12

    @property
    def compute_bound(self) -> bool:
        """Whether operations, not bytes, are what it should be held up by."""
        return self.flops > COMPUTE_BOUND * self.bytes


@dataclass(frozen=True)
class Report:
    """All that one folder's check says."""

    name: str
    kernels: tuple[KernelRow, ...]
    checks: tuple[Check, ...]
    speeds: Speeds | None
    torch: TorchTimes | None

    @property
    def ok(self) -> bool:
        """Whether every kernel is within its bound and the whole model agrees with itself."""
        return all(row.error <= 1 for row in self.kernels) and all(check.ok for check in self.checks)


def check_kernel(call: KernelCall, function: Callable[..., Any], device: KernelDevice) -> KernelRow:
    """Run one kernel against its reference, and time it."""
    case = case_of(call)
    tensors = [device.upload(array) for array in case.arrays]
    device.run(function, tensors)
    found = [
        device.download(tensor, spec) if i in _compared(case) else array
        for i, (tensor, spec, array) in enumerate(zip(tensors, call.parameters, case.arrays, strict=True))
    ]
    held = sum(case.arrays[i].nbytes for i in case.held)
    copies = min(MOST_COPIES, -(-COLD_BYTES // max(held, 1))) if held else 1
    sets = [tensors]
    for _ in range(copies - 1):
        sets.append([device.upload(array) if i in case.held else tensors[i] for i, array in enumerate(case.arrays)])
    seconds = device.seconds(function, sets)
    moved = sum(tensor_bytes(spec) for i, spec in enumerate(call.parameters[: case.output + 1]) if i not in case.held)
    return KernelRow(call.kernel, label_of(call), " ".join(sorted(call.calls)), case.error(found), seconds, call.bytes + moved, call.flops)


def _compared(case: KernelCase) -> set[int]:
    return {case.output, *(check.parameter for check in case.expected)}


def label_of(call: KernelCall) -> str:
    """What the kernel computes, in a few words."""
    first = call.arguments[0]
    if call.op in ("linear", "embedding"):
        return f"{prod(first['lead'])} x {first['k']} -> {first['n']} {first['weight']['dtype']}"
    if call.op == "rolling_attention":
        return f"{first['tokens']} tokens, {first['n_heads']}/{first['n_kv_heads']} heads of {first['head_dim']}, {first['cache_len']} slots"
    if call.op == "mixture":
        return f"{prod(first['lead'])} x {first['dim']}, {first['experts_per_token']} of {first['n_experts']} {first['weight']['dtype']}"
    return " x ".join(map(str, (prod(first), *call.arguments[1:2])))


class CudaKernels:
    """The device of `runtime.cuda`, as kernels are called on it one by one."""

    def __init__(self, device: Any) -> None:  # noqa: ANN401 (runtime.cuda.Device, which loads TVM's runtime)
        self._device = device

    def upload(self, array: Array) -> Any:  # noqa: ANN401
        """A tensor with the array's numbers."""
        tensor = self._device.tensor(TensorSpec(name="", shape=array.shape, dtype=str(array.dtype)))  # type: ignore[arg-type]
        self._device.memory.upload([(tensor.data_ptr(), array)], lambda _nbytes: None)
        return tensor

    def download(self, tensor: Any, spec: TensorSpec) -> Array:  # noqa: ANN401
        """A tensor's numbers."""
        array = np.empty(spec.shape, numpy_dtype(spec.dtype))
        self._device.memory.to_host(array, tensor.data_ptr())
        self._device.memory.wait()
        return array

    def run(self, function: Callable[..., Any], tensors: Sequence[Any]) -> None:
        """Call a kernel and wait for it."""
        with self._device.on_stream():
            function(*tensors)
        self._device.memory.wait()

    def seconds(self, function: Callable[..., Any], sets: Sequence[Sequence[Any]]) -> float:
        """Median over passes of a graph of at least `LAUNCHES` calls."""
        memory = self._device.memory
        calls = -(-LAUNCHES // len(sets)) * len(sets)
        with memory.capture() as made, self._device.on_stream():
            for i in range(calls):
                function(*sets[i % len(sets)])
        memory.launch(made[0])
        samples = [memory.seconds(lambda: memory.launch(made[0])) for _ in range(PASSES)]
        memory.forget(made[0])
        return median(samples) / calls

    def copy_gb_s(self, nbytes: int = 2**30) -> float:
        """Bandwidth of a copy on the device, bytes read and written; the best of several."""
        specs = [TensorSpec(name="", shape=(nbytes,), dtype="uint8") for _ in range(2)]
        source, target = (self._device.tensor(spec).data_ptr() for spec in specs)
        memory = self._device.memory
        seconds = [memory.seconds(lambda: memory.on_device(target, source, nbytes)) for _ in range(PASSES + 1)]
        return 2 * nbytes / min(seconds) / 1e9


def check_folder(folder: Path, device: Any, *, whole: bool) -> Report:  # noqa: ANN401
    """Every kernel of a folder's library, then the model."""
    from runtime import cuda
    from runtime.engine import Engine

    manifest = manifest_of(folder)
    kernels = CudaKernels(device)
    library = device.ffi.load_module(str((folder / LIBRARY_FILE).resolve())).imports[0]
    rows = []
    for number, call in enumerate(manifest.calls, start=1):
        _say(f"\r{manifest.name}: kernel {number} of {len(manifest.calls)}")
        rows.append(check_kernel(call, library[call.kernel], kernels))
    _say("\n")
    checks: tuple[Check, ...] = ()
    speeds = None
    if whole and manifest.model.generates:
        loaded = cuda.load_library(device, manifest, folder / LIBRARY_FILE, random_weights(manifest.weights))
        engine = Engine(manifest, folder, loaded.functions, loaded.inputs, loaded.caches)
        checks = verify(engine)
        speeds = measure(engine, manifest.model.vocab_size, WORKLOAD, step_bytes_of(manifest))
    return Report(manifest.name, tuple(rows), checks, speeds, ask_torch(products_of(manifest)))


def products_of(manifest: Manifest) -> list[Product]:
    """The matrix products of one token and of the longest timed prompt, by their sizes, and how many a pass has."""
    found = []
    longest = max(manifest.graphs, key=lambda graph: graph.tokens)
    for graph, rows in (("decode", manifest.shape.batch), (longest.name, manifest.shape.batch * max(WORKLOAD.prompt_tokens))):
        for call in manifest.calls:
            if call.op == "linear" and graph in call.calls:
                first = call.arguments[0]
                head_alone = prod(first["lead"]) == manifest.shape.batch
                found.append(Product(graph, manifest.shape.batch if head_alone else rows, first["n"], first["k"], call.calls[graph]))
    return found


def manifest_of(folder: Path) -> Manifest:
    """The manifest of an artifact or of a check folder; UserError where there is none, or none with kernels."""
    path = folder / MANIFEST_FILE
    try:
        manifest = decode(path.read_bytes(), Manifest, str(path))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}; name an artifact, or a folder of checks/ as `make gpucheck` ships it") from error
    if manifest.target.kind != "cuda":
        raise UserError(f"{path} is of the target {manifest.target.kind}, expected cuda: compile it with backend.target: cuda")
    return manifest


def table(report: Report, copy_gb_s: float) -> str:
    """The kernels, slowest pass first, and below them the model; shares are of the measured copy bandwidth and matrix peak."""
    peak = report.torch.peak_tflop_s if report.torch else None
    rows = [("kernel", "computes", "graphs", "error/bound", "us", "GB/s", "TFLOP/s", "share")]
    for row in report.kernels:
        share = (f"{row.tflop_s / peak:.0%} of peak" if peak else "") if row.compute_bound else f"{row.gb_s / copy_gb_s:.0%} of copy"
        error = f"{row.error:.2g}{'' if row.error <= 1 else '  WRONG'}"
        rows.append((row.kernel, row.label, row.graphs, error, f"{row.seconds * 1e6:,.1f}", f"{row.gb_s:,.0f}", f"{row.tflop_s:,.2f}", share))
    lines = [f"{report.name}: copy {copy_gb_s:,.0f} GB/s" + (f", matrix peak {peak:,.0f} TFLOP/s (torch, fp16)" if peak else ""), *aligned(rows)]
    lines += [f"{check.check}: {check.found}, expected {check.expected}{'' if check.ok else '  WRONG'}" for check in report.checks]
    lines += _speed_lines(report, copy_gb_s)
    return "\n".join(lines)


def _speed_lines(report: Report, copy_gb_s: float) -> list[str]:
    """tok/s and TTFT, beside what torch takes for the same matrix products."""
    if report.speeds is None:
        return []
    longest = max(WORKLOAD.prompt_tokens)
    torch = {} if report.torch is None else report.torch.seconds
    rows = []
    for d in report.speeds.decode:
        beside = f", {d.step_s / torch['decode']:.2f} of torch's products alone" if "decode" in torch else ""
        share = f"{d.gb_s / copy_gb_s:.0%} of copy{beside}"
        rows.append((f"decode, context {d.context}", f"{d.tok_s:,.1f} tok/s", f"{d.step_s * 1e3:,.2f} ms", share))
    prefill = [seconds for graph, seconds in torch.items() if graph != "decode"]
    for p in report.speeds.prefill:
        share = f"{p.ttft_s / prefill[0]:.2f} of torch's products alone" if prefill and p.prompt_tokens == longest else ""
        rows.append((f"TTFT, {p.prompt_tokens} tokens", f"{p.tok_s:,.1f} tok/s", f"{p.ttft_s * 1e3:,.2f} ms", share))
    return [*aligned(rows), *report.speeds.skipped]


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(text, end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Check every folder and print a table for each; UserError when something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m runtime.gpucheck", description="Check and time the kernels of CUDA libraries on this GPU.")
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="artifacts, or folders of checks/")
    parser.add_argument("--kernels-only", action="store_true", help="leave out the whole model, whose random weights take its full size")
    parser.add_argument("--json", action="store_true", help="print one JSON object a folder, a line each")
    args = parser.parse_args(argv)
    manifests = [manifest_of(folder) for folder in args.folders]
    from runtime.cuda import Device  # loads TVM's runtime, which `--help` and a wrong folder need not wait for

    device = Device.open(manifests[0].target.arch, threads=1)
    copy_gb_s = CudaKernels(device).copy_gb_s()
    wrong = []
    for folder in args.folders:
        report = check_folder(folder, device, whole=not args.kernels_only)
        print(json.dumps({"ok": report.ok, "copy_gb_s": copy_gb_s, **asdict(report)}) if args.json else f"{table(report, copy_gb_s)}\n", flush=True)
        wrong += [] if report.ok else [str(folder)]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: something is wrong on {device.description.name}; the table above says what")
    return 0


if __name__ == "__main__":
    run_command(main)
