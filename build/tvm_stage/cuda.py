"""The CUDA toolchain: NVIDIA's compiler from the package registry, and TVM's CUDA library.

The machine may have neither a GPU nor a driver. If TVM cannot load its own `libtvm_runtime_cuda.so`, it silently
stores CUDA *source* in the library. That file needs the driver's libcuda.so.1; where there is none, this process
loads a stub instead, which has the symbols and answers "no device" to every call.
"""

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import msgspec

from build.compiler import tvm
from runtime.artifact.manifest import KernelUsage, TargetSpec
from runtime.artifact.targets import TARGETS
from runtime.engines.cuda_driver import DRIVER
from runtime.engines.tvm_runtime import find_library
from runtime.errors import UserError

KERNELS_FILE = "kernels.json"
SOURCE_FILE = "kernels.cu"
PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime")
TOOLKIT_MAJOR = "13"  # TVM's CUDA library is linked against libcudart.so.13
DRIVER_SYMBOLS = (  # all that TVM's CUDA library imports from the driver
    "cuDeviceGetName",
    "cuFuncSetAttribute",
    "cuGetErrorName",
    "cuGetErrorString",
    "cuLaunchKernelEx",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuTensorMapEncodeTiled",
)
NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE
COMPILE_CALLBACK = "tvm_callback_cuda_compile"
USAGE = re.compile(
    r"Compiling entry function '(?P<kernel>\w+)' for '(?P<arch>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r"[^\n]*Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)
SHARED = re.compile(r"(\d+) bytes smem")


@contextmanager
def toolchain(spec: TargetSpec, folder: Path, dump: Path | None) -> Iterator[None]:
    """Make TVM compile CUDA kernels to machine code for `spec.arch`, and to nothing else, while this context is open.

    `folder` receives the kernels' resource usage. Raises `UserError` if a package or the host's compiler is missing,
    or if nvcc does not support one of the architectures.
    """
    nvcc = find_nvcc()
    check_archs(nvcc, spec.arch)
    load_tvm_cuda()

    def compile_kernels(source: str) -> bytearray:
        if dump is not None:
            (dump / SOURCE_FILE).write_text(source)
        code, usage = compile_fatbin(nvcc, source, spec.arch)
        (folder / KERNELS_FILE).write_bytes(msgspec.json.encode(usage))
        return bytearray(code)

    previous = tvm.get_global_func(COMPILE_CALLBACK)
    tvm.register_global_func(COMPILE_CALLBACK, compile_kernels, override=True)
    try:
        yield
    finally:
        tvm.register_global_func(COMPILE_CALLBACK, previous, override=True)


def find_nvcc() -> Path:
    """Find nvcc as installed from the package registry.

    Raises `UserError` if a package that it needs or the host's C++ compiler is missing.
    """
    missing = [name for name in PACKAGES if not _installed(name)]
    if missing:
        raise UserError(
            f"cuda needs packages of version {TOOLKIT_MAJOR} that are not installed: {', '.join(missing)}; "
            "run `make setup`"
        )
    lacking = [name for name in ("gcc", "g++") if shutil.which(name) is None]
    if lacking:
        raise UserError(
            f"backend.target cuda needs {' and '.join(lacking)}, which nvcc calls; "
            "install them (Debian: apt install g++)"
        )
    package = distribution("nvidia-cuda-nvcc")
    found = [Path(str(file.locate())) for file in package.files or () if str(file).endswith("/bin/nvcc")]
    if not found:
        raise UserError(
            f"the package nvidia-cuda-nvcc {package.version} has no bin/nvcc, expected version {TOOLKIT_MAJOR}; "
            "run `make setup`"
        )
    return found[0]


def _installed(package: str) -> bool:
    try:
        return distribution(package).version.startswith(f"{TOOLKIT_MAJOR}.")
    except PackageNotFoundError:
        return False


def check_archs(nvcc: Path, archs: Sequence[str]) -> None:
    """Raise `UserError` if nvcc cannot generate machine code for one of `archs`."""
    known = _run([str(nvcc), "--list-gpu-code"]).split()
    unknown = [
        arch for arch in archs if arch.removesuffix("a") not in known or (arch.endswith("a") and int(arch[3:-1]) < 90)
    ]
    if unknown:
        raise UserError(
            f"backend.arch holds {unknown[0]}, which nvcc cannot compile for; expected some of {', '.join(known)} "
            "(sm_90 and later also with the suffix a)"
        )


def compile_fatbin(nvcc: Path, source: str, archs: Sequence[str]) -> tuple[bytes, list[KernelUsage]]:
    """Compile a CUDA source for each architecture into one fatbin without PTX; also returns the kernels' usage.

    Fast math stays off: it would round exp and division more coarsely than the bounds of `make parity` assume.
    """
    codes = [part for arch in archs for part in ("-gencode", f"arch={arch.replace('sm', 'compute')},code={arch}")]
    with tempfile.TemporaryDirectory() as name:
        text, binary = Path(name) / SOURCE_FILE, Path(name) / "kernels.fatbin"
        text.write_text(source)
        # Diagnostic 177: unused variable.
        flags = ["--fatbin", "-O3", "--no-compress", "--threads=0", "--resource-usage", "-diag-suppress=177"]
        report = _run([str(nvcc), *flags, *codes, "-o", str(binary), str(text)])
        return binary.read_bytes(), read_usage(report)


def read_usage(report: str) -> list[KernelUsage]:
    """Read each kernel's resource usage from the assembler's report."""
    rows = []
    for match in USAGE.finditer(report):
        shared = SHARED.search(match["rest"])
        spills = int(match["stores"]) + int(match["loads"])
        rows.append(
            KernelUsage(
                kernel=match["kernel"],
                arch=match["arch"],
                registers=int(match["registers"]),
                shared_bytes=int(shared[1]) if shared else 0,
                stack_bytes=int(match["stack"]),
                spill_bytes=spills,
            )
        )
    return sorted(rows, key=lambda row: (row.kernel, row.arch))


def usage_of(folder: Path) -> tuple[KernelUsage, ...]:
    """Resource usage that `toolchain` recorded for a library's kernels; empty for other targets."""
    path = folder / KERNELS_FILE
    return msgspec.json.decode(path.read_bytes(), type=tuple[KernelUsage, ...]) if path.is_file() else ()


def spilling(usage: Sequence[KernelUsage]) -> list[str]:
    """One sentence for each kernel that spills some of its registers to memory."""
    return [
        f"{row.kernel} spills {row.spill_bytes} bytes per thread on {row.arch} ({row.registers} registers): "
        "it will be slower there"
        for row in usage
        if row.spill_bytes
    ]


def _run(command: list[str]) -> str:
    """Run a compiler and return its output.

    The environment holds only PATH, so that nobody's NVCC_APPEND_FLAGS changes the result.
    """
    environment = {"PATH": os.environ.get("PATH", os.defpath)}
    result = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {result.returncode}:\n{result.stdout}")
    return result.stdout


def load_tvm_cuda() -> None:
    """Load TVM's CUDA library into this process, with the driver if there is one, otherwise with a stub."""
    try:
        ctypes.CDLL(DRIVER, ctypes.RTLD_GLOBAL)
    except OSError:
        _load_driver_stub()
    for name in TARGETS["cuda"].libraries:
        ctypes.CDLL(str(find_library(name)), ctypes.RTLD_GLOBAL)


def _load_driver_stub() -> None:
    """Compile and load a libcuda.so.1 whose functions all fail; the loader later finds it in memory by its name."""
    source = "\n".join(f"int {name}(void) {{ return {NO_DEVICE}; }}" for name in DRIVER_SYMBOLS)
    with tempfile.TemporaryDirectory() as name:
        text, stub = Path(name) / "driver.c", Path(name) / DRIVER
        text.write_text(source)
        _run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{DRIVER}", "-o", str(stub), str(text)])
        ctypes.CDLL(str(stub), ctypes.RTLD_GLOBAL)
