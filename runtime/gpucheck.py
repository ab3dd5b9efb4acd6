"""`python -m runtime.gpucheck FOLDER ...`: is each of our CUDA kernels right on this GPU, and how close to its limits?

A folder holds a manifest and a library: an artifact, or what `make gpucheck` compiled in a model's sizes without its
weights. The weights are random and made here from a seed. Each of our kernels runs by itself, and its outputs are
compared with a reference in float64 (`runtime.gpu_check.kernel_cases`). Then it is timed: a captured graph launches it
many times on several copies of its weights, so that they come from memory and not from a cache. Its share of the limit
is the larger of two times divided by its own: its bytes at the speed of a copy, and its operations at the matrix peak.
Rows appear as they are measured, so that nothing is lost if a run is killed. Last, the whole model runs: the checks of
`runtime.verify`, and its speed (`runtime.bench`). If some Python on this machine has torch, it measures the matrix peak
and the matrix products, and if one has transformers, it measures a model of the same sizes, each in a separate process.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import prod
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.build_number import check_build_number, required_build
from runtime.artifact.consistency import LIBRARY_FILE, MANIFEST_FILE
from runtime.artifact.folder import read_manifest, sealed_library
from runtime.artifact.hashing import check_sums
from runtime.artifact.manifest import KernelCall, Manifest, TensorSpec
from runtime.artifact.signing import key_of_environment
from runtime.artifact.targets import TARGETS
from runtime.artifact.tensor_file import numpy_dtype, tensor_bytes
from runtime.bench import Workload, measure, step_bytes_of
from runtime.benchmarks.sequences import SequencesWorkload, SlotSequences, measure_sequences
from runtime.engines.tvm_runtime import kernel_of, open_library
from runtime.errors import UserError, run_command
from runtime.gpu_check.kernel_cases import case_of
from runtime.gpu_check.random_tensors import random_weights
from runtime.gpu_check.report import (
    HEADING,
    GpuLimits,
    KernelRow,
    ModelReport,
    Rivals,
    as_json,
    kernel_line,
    label_of,
    line,
    model_lines,
)
from runtime.gpu_check.torch_process import Product, ask_torch, ask_transformers
from runtime.verify import Check, verify, verify_draws

Array = NDArray[Any]

COLD_BYTES = 256 * 2**20  # copies of a kernel's weights take this much, several times the L2 cache of any GPU
LAUNCHES, PASSES = 64, 3  # most launches of a kernel in one graph, and how often the graph is timed
GRAPH_SECONDS = 0.02  # time that a graph of launches should take
WORKLOAD = Workload(prompt_tokens=(128, 512, 2048), contexts=(64, 2048), steps=64, repeats=2)
SEQUENCES = SequencesWorkload(counts=(1, 2, 4, 8, 16, 32, 64, 128), contexts=(64, 2048), steps=32, repeats=2)


class KernelDevice(Protocol):
    """The device that kernels are called on and timed with."""

    def upload(self, array: Array) -> Any:  # noqa: ANN401 (tensors of a runtime)
        """A tensor with the array's numbers."""

    def copy(self, tensor: Any, spec: TensorSpec) -> Any:  # noqa: ANN401
        """Another tensor with the same numbers."""

    def download(self, tensor: Any, spec: TensorSpec) -> Array:  # noqa: ANN401
        """A tensor's numbers."""

    def run(self, function: Callable[..., Any], tensors: Sequence[Any]) -> None:
        """Call a kernel and wait for it."""

    def seconds(self, function: Callable[..., Any], sets: Sequence[Sequence[Any]], calls: int) -> float:
        """Mean time of a call, over `calls` calls that take one set of tensors after the other."""


def check_kernel(call: KernelCall, function: Callable[..., Any], device: KernelDevice, *, half: bool) -> KernelRow:
    """Compare one kernel with its reference, which allows for rounding to float16 if `half`, and time it."""
    case = case_of(call, half=half)
    tensors = [device.upload(array) for array in case.arrays]
    device.run(function, tensors)
    found = [
        device.download(tensor, spec) if i in case.compared else array
        for i, (tensor, spec, array) in enumerate(zip(tensors, call.parameters, case.arrays, strict=True))
    ]
    calls = max(1, min(LAUNCHES, round(GRAPH_SECONDS / device.seconds(function, [tensors], 1))))
    held = sum(case.arrays[i].nbytes for i in case.held)
    copies = min(calls, -(-COLD_BYTES // max(held, 1))) if held else 1
    sets = [tensors]
    for _ in range(copies - 1):
        sets.append(
            [device.copy(tensor, call.parameters[i]) if i in case.held else tensor for i, tensor in enumerate(tensors)]
        )
    seconds = device.seconds(function, sets, -(-calls // copies) * copies)
    moved = sum(tensor_bytes(spec) for i, spec in enumerate(call.parameters[: case.output + 1]) if i not in case.held)
    cold = copies * held >= COLD_BYTES
    return KernelRow(
        call.kernel,
        label_of(call),
        " ".join(sorted(call.calls)),
        case.error(found),
        seconds,
        call.bytes + moved,
        call.flops,
        cold,
    )


class CudaKernels:
    """The device of `runtime.engines.cuda`, on which kernels are called one by one."""

    # the device is a runtime.engines.cuda_device.Device, which loads TVM's runtime
    def __init__(self, device: Any) -> None:  # noqa: ANN401
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

    def copy(self, tensor: Any, spec: TensorSpec) -> Any:  # noqa: ANN401
        """Another tensor with the same numbers."""
        other = self._device.tensor(spec)
        self._device.memory.on_device(other.data_ptr(), tensor.data_ptr(), tensor_bytes(spec))
        self._device.memory.wait()
        return other

    def run(self, function: Callable[..., Any], tensors: Sequence[Any]) -> None:
        """Call a kernel and wait for it."""
        with self._device.on_stream():
            function(*tensors)
        self._device.memory.wait()

    def seconds(self, function: Callable[..., Any], sets: Sequence[Sequence[Any]], calls: int) -> float:
        """Mean time of a call in a graph of `calls`: the median over several launches of the graph."""
        memory = self._device.memory

        def launch_all() -> None:
            with self._device.on_stream():
                for i in range(calls):
                    function(*sets[i % len(sets)])

        graph = memory.record(launch_all)
        memory.launch(graph)
        samples = [memory.seconds(lambda: memory.launch(graph)) for _ in range(PASSES)]
        memory.forget(graph)
        return median(samples) / calls

    def copy_gb_s(self, nbytes: int = 2**30) -> float:
        """Bandwidth of a copy on the device, counting bytes read and written; the best of several."""
        spec = TensorSpec(name="", shape=(nbytes,), dtype="uint8")
        source, target = self._device.tensor(spec), self._device.tensor(spec)
        memory = self._device.memory
        copy = partial(memory.on_device, target.data_ptr(), source.data_ptr(), nbytes)
        return 2 * nbytes / min(memory.seconds(copy) for _ in range(PASSES + 1)) / 1e9


def check_kernels(
    folder: Path,
    manifest: Manifest,
    device: Any,  # noqa: ANN401
    told: Callable[[KernelRow], None],
) -> tuple[KernelRow, ...]:
    """Check each of our kernels in a folder's library; `told` gets each row immediately."""
    kernels = CudaKernels(device)
    library = open_library(device.ffi, sealed_library(folder, manifest, manifest.target.levels[0]))
    rows = []
    for call in manifest.calls:
        try:
            row = check_kernel(call, kernel_of(library, call.kernel), kernels, half=manifest.target.dtype == "fp16")
        except UserError as error:  # the device does not respond after one
            raise UserError(f"{folder}: {call.kernel} ({label_of(call)}): {error}") from error
        told(row)
        rows.append(row)
    return tuple(rows)


def check_model(
    folder: Path,
    manifest: Manifest,
    kernels: tuple[KernelRow, ...],
    device: Any,  # noqa: ANN401
) -> ModelReport:
    """Run the whole model with random weights: the checks of `runtime.verify`, and if they pass, its speed.

    A model that generates no text is not run. `kernels` are those of its library, which the report names too.
    """
    from runtime.engines import cuda
    from runtime.engines.engine import Engine
    from runtime.engines.side_by_side import SideBySide

    report = ModelReport(manifest.name, kernels)
    if not manifest.model.generates:
        return report
    library = sealed_library(folder, manifest, manifest.target.levels[0])
    loaded = cuda.load_library(device, manifest, library, random_weights(manifest.weights))
    engine = Engine(manifest, folder, loaded)
    checks = (*verify(SideBySide(engine, engine.slots)), *verify_draws(SideBySide(engine, 1)))
    report = replace(report, checks=checks)
    if not all(check.ok for check in checks):
        return report
    vocab_size = manifest.model.vocab_size
    speeds = measure(SideBySide(engine, 1), vocab_size, WORKLOAD, step_bytes_of(manifest))
    counts = tuple(n for n in SEQUENCES.counts if n <= engine.slots)
    together = measure_sequences(SlotSequences(engine), vocab_size, replace(SEQUENCES, counts=counts))
    return replace(report, speeds=speeds, sequences=together if len(counts) > 1 else None)


def products_of(manifest: Manifest) -> list[Product]:
    """The matrix products of one token and of the longest timed prompt, with their number per call.

    Empty for a mixture, and for a model that generates no text.
    """
    if manifest.model.n_experts is not None or not manifest.model.generates:
        return []
    found = []
    longest = max(manifest.functions, key=lambda function: function.tokens).name
    for label, function, rows in (("decode", "step_1", 1), ("prefill", longest, max(WORKLOAD.prompt_tokens))):
        for call in manifest.calls:
            if call.op == "linear" and function in call.calls:
                first = call.arguments[0]
                one = prod(first["lead"]) == 1  # as for the head, which only a prompt's last token needs
                found.append(
                    Product(
                        f"{manifest.name} {label}", 1 if one else rows, first["n"], first["k"], call.calls[function]
                    )
                )
    return found


def checked_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact or of a check folder, signed and as new as this environment requires.

    Raises `UserError` if there is no manifest, or none that lists the library with its sum and names CUDA kernels.
    """
    path = folder / MANIFEST_FILE
    manifest = read_manifest(folder, key_of_environment())
    check_build_number(folder, manifest.build_number, required_build())
    library = [entry for entry in manifest.files if entry.path == LIBRARY_FILE]
    if len(library) != 1:
        raise UserError(
            f"{path} lists no {LIBRARY_FILE}; name an artifact, or a folder of checks/ as `make gpucheck` ships it"
        )
    check_sums(folder, library)
    if not TARGETS[manifest.target.kind].on_device:
        raise UserError(
            f"{path} is for the target {manifest.target.kind}, expected cuda: compile it with backend.target: cuda"
        )
    if not manifest.calls:
        raise UserError(f"{path} names no kernel, expected those that the library calls; compile it again")
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Check every folder, all kernels before any whole model; raises `UserError` if something is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.gpucheck", description="Check and time the kernels of CUDA libraries on this GPU."
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="artifacts, or folders of checks/")
    parts = parser.add_mutually_exclusive_group()
    parts.add_argument(
        "--kernels-only", action="store_true", help="skip the whole model, whose random weights take its full size"
    )
    parts.add_argument("--models-only", action="store_true", help="skip the kernels one by one")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object per folder, each on one line, at the end"
    )
    args = parser.parse_args(argv)
    manifests = {folder: checked_manifest(folder) for folder in args.folders}
    from runtime.engines.cuda_device import Device  # loads TVM's runtime, which `--help` and wrong folders do not need

    # each call refuses a GPU that its artifact was not compiled for
    devices = [Device.open(manifest.target.arch, threads=1) for manifest in manifests.values()]
    device = devices[0]
    say = _nothing if args.json else partial(print, flush=True)
    torch = ask_torch([product for manifest in manifests.values() for product in products_of(manifest)])
    limits = GpuLimits(CudaKernels(device).copy_gb_s(), torch.peak_tflop_s if torch else None)
    peak = "no torch" if torch is None else f"matrix peak {torch.peak_tflop_s:,.0f} TFLOP/s (torch, fp16)"
    say(f"{device.description.name}: copy {limits.copy_gb_s:,.0f} GB/s, {peak}")
    smallest = sorted(manifests, key=lambda folder: sum(map(tensor_bytes, manifests[folder].weights)))
    kernels: dict[Path, tuple[KernelRow, ...]] = dict.fromkeys(smallest, ())
    for folder in () if args.models_only else smallest:
        say(f"\n{manifests[folder].name}\n{line(HEADING)}")
        kernels[folder] = check_kernels(folder, manifests[folder], device, lambda row: say(kernel_line(row, limits)))
    wrong = []
    transformers = lru_cache(maxsize=None)(
        lambda model: ask_transformers(model, WORKLOAD.prompt_tokens, WORKLOAD.contexts)
    )
    for folder in smallest:
        manifest = manifests[folder]
        # before our weights take memory
        rival = transformers(manifest.model) if manifest.model.generates and not args.kernels_only else None
        report = ModelReport(manifest.name, kernels[folder])
        try:
            if not args.kernels_only:
                report = check_model(folder, manifest, kernels[folder], device)
        except UserError as error:  # for example too little memory; other folders may still fit
            report = replace(report, checks=(Check("whole model", str(error), "a run", ok=False),))
        if args.json:
            print(as_json(report, limits), flush=True)
        elif not args.kernels_only:
            say("\n".join(["", manifest.name, *model_lines(report, limits, Rivals(torch, rival))]))
        wrong += [] if report.ok else [str(folder)]
    if wrong:
        raise UserError(f"{', '.join(wrong)}: something is wrong on {device.description.name}; see the output above")
    return 0


def _nothing(_text: str) -> None:
    """Print nothing, in place of `print`."""


if __name__ == "__main__":
    run_command(main)
