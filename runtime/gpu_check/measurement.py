"""What a process of its own measures for `runtime.gpucheck`: `python -m runtime.gpu_check.measurement PART FOLDER`.

It writes a line of JSON for each finding as soon as there is one: an object whose key is one of `FINDINGS`. A kernel
that fails or hangs takes this process along, and nothing that it has written.
"""

import argparse
import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from runtime.artifact.folder import sealed_library
from runtime.artifact.manifest import Manifest
from runtime.bench import Speeds, Workload, measure, step_bytes_of
from runtime.benchmarks.sequences import SequencesReport, SequencesWorkload, SlotSequences, measure_sequences
from runtime.engines.cuda_driver import read_driver, version_text
from runtime.engines.tvm_runtime import kernel_of, open_library
from runtime.errors import run_command
from runtime.gpu_check.folder import checked_manifest
from runtime.gpu_check.kernel_cases import case_of
from runtime.gpu_check.kernel_timing import CudaKernels, check_kernel
from runtime.gpu_check.random_tensors import random_weights
from runtime.gpu_check.report import Gpu, KernelRow
from runtime.verify import Check, verify, verify_draws

WORKLOAD = Workload(prompt_tokens=(128, 512, 2048), contexts=(64, 2048), steps=64, repeats=2)
SEQUENCES = SequencesWorkload(counts=(1, 2, 4, 8, 16, 32, 64, 128), contexts=(64, 2048), steps=32, repeats=2)
FINDINGS: Mapping[str, Any] = {
    "gpu": Gpu,
    "kernel": KernelRow,
    "launched": int,
    # those of a whole model, with the names that they have in a `ModelReport`
    "checks": tuple[Check, ...],
    "speeds": Speeds,
    "sequences": SequencesReport,
}
NVML = "libnvidia-ml.so.1"
VERSION_LENGTH = 80  # NVML_SYSTEM_DRIVER_VERSION_BUFFER_SIZE


def tell(name: str, finding: object) -> None:
    """Write a finding, of the type that `FINDINGS` has for its name, on a line that no library has begun."""
    print(f"\n{json.dumps({name: msgspec.to_builtins(finding)})}", flush=True)


def finding_of(line: str) -> tuple[str, Any] | None:
    """Name and finding of a line that `tell` has written; None for another line, such as a library's warning."""
    if not line.startswith("{"):
        return None
    try:
        ((name, found),) = json.loads(line).items()
    except ValueError:
        return None
    return (name, msgspec.convert(found, FINDINGS[name])) if name in FINDINGS else None


# the device is a runtime.engines.cuda_device.Device, which loads TVM's runtime
def open_device(manifest: Manifest) -> Any:  # noqa: ANN401
    """The GPU; raises `UserError` for one that the folder was not compiled for."""
    from runtime.engines.cuda_device import Device  # loads TVM's runtime, which the parent process does not need

    return Device.open(manifest.target.arch, threads=1)


def measure_gpu(folders: Sequence[Path]) -> None:
    """The GPU, which must run the libraries of all folders, and the bandwidth of a copy."""
    device = [open_device(checked_manifest(folder)) for folder in folders][-1]
    tell("gpu", Gpu(device.description.name, driver_version(), CudaKernels(device).copy_gb_s()))


def driver_version() -> str:
    """The driver's version as `nvidia-smi` shows it, or the CUDA that it is for, without NVIDIA's library."""
    text = ctypes.create_string_buffer(VERSION_LENGTH)
    try:
        library = ctypes.CDLL(NVML)
        if library.nvmlInit_v2() == 0 and library.nvmlSystemGetDriverVersion(text, VERSION_LENGTH) == 0:
            return text.value.decode()
    except (OSError, AttributeError):
        pass
    return f"for CUDA {version_text(read_driver().version)}"


def open_kernels(folder: Path) -> tuple[Manifest, Any, CudaKernels]:
    """A folder's manifest, its open library, and the device to call its kernels on."""
    manifest = checked_manifest(folder)
    device = open_device(manifest)
    library = open_library(device.ffi, sealed_library(folder, manifest, manifest.target.levels[0]))
    return manifest, library, CudaKernels(device)


def measure_kernels(folder: Path, first: int) -> None:
    """Check and time each of our kernels in a folder's library, from the call with the number `first`."""
    manifest, library, kernels = open_kernels(folder)
    for call in manifest.calls[first:]:
        half = manifest.target.dtype == "fp16"
        tell("kernel", check_kernel(call, kernel_of(library, call.kernel), kernels, half=half))


def launch_kernels(folder: Path) -> None:
    """Launch each kernel once, for a tool that watches this process."""
    manifest, library, kernels = open_kernels(folder)
    for call in manifest.calls:
        arrays = case_of(call, half=manifest.target.dtype == "fp16").arrays
        kernels.run(kernel_of(library, call.kernel), [kernels.upload(array) for array in arrays])
    tell("launched", len(manifest.calls))


def measure_model(folder: Path) -> None:
    """Run the whole model with random weights: the checks of `runtime.verify`, and if they pass, its speed."""
    from runtime.engines import cuda
    from runtime.engines.engine import Engine
    from runtime.engines.side_by_side import SideBySide

    manifest = checked_manifest(folder)
    library = sealed_library(folder, manifest, manifest.target.levels[0])
    loaded = cuda.load_library(open_device(manifest), manifest, library, random_weights(manifest.weights))
    engine = Engine(manifest, folder, loaded)
    checks = (*verify(SideBySide(engine, engine.slots)), *verify_draws(SideBySide(engine, 1)))
    tell("checks", checks)
    if not all(check.ok for check in checks):
        return
    vocab_size = manifest.model.vocab_size
    tell("speeds", measure(SideBySide(engine, 1), vocab_size, WORKLOAD, step_bytes_of(manifest)))
    counts = tuple(n for n in SEQUENCES.counts if n <= engine.slots)
    if len(counts) > 1:
        tell("sequences", measure_sequences(SlotSequences(engine), vocab_size, replace(SEQUENCES, counts=counts)))


PARTS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "gpu": lambda args: measure_gpu(args.folders),
    "kernels": lambda args: measure_kernels(args.folders[0], args.first),
    "model": lambda args: measure_model(args.folders[0]),
    "launches": lambda args: launch_kernels(args.folders[0]),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one part; raises `UserError` if something is wrong."""
    parser = argparse.ArgumentParser(prog="python -m runtime.gpu_check.measurement")
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("folders", type=Path, nargs="+", help="all that are checked for `gpu`, one for other parts")
    parser.add_argument("--first", type=int, default=0, help="number of the first kernel")
    args = parser.parse_args(argv)
    PARTS[args.part](args)
    return 0


if __name__ == "__main__":
    run_command(main)
