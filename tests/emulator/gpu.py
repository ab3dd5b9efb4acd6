"""An emulated GPU: the CUDA source that TVM generates, compiled by g++ and run with a fiber for each thread.

`load()` puts stand-ins for NVIDIA's driver and runtime library (`device/`) into this process. From then on TVM's `cuda`
device works: its modules are loaded, launched and captured in graphs. Where nvcc's machine code would be, a module has
the path of its source, which is compiled when it is first launched.
"""

import ctypes
import hashlib
import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from filelock import FileLock

from tests.emulator.source import rewritten

HERE = Path(__file__).parent
DRIVER, RUNTIME = "libcuda.so.1", "libcudart.so.13"
MARK = b"emulated:"  # as in device/driver.cpp
ORDERS = ("forward", "reverse", "random")  # as in device/settings.h
Order = Literal["forward", "reverse", "random"]

LANGUAGE = ["-std=c++20", "-march=native", "-fPIC"]
DEVICE = [*LANGUAGE, "-O2", "-Wall", "-fno-math-errno", "-shared"]
KERNELS = [*LANGUAGE, "-shared", "-fno-strict-aliasing", "-fvisibility=hidden", "-fno-exceptions", "-w"]
# With products contracted to FMAs as nvcc does it; vectorizing would take longer than it saves.
FAST = ["-O2", "-ffp-contract=fast", "-fno-tree-vectorize"]
# Not optimized: each access happens where the source has it, and compiling takes the least time.
CHECKED = [
    "-O0",
    "-g1",
    "-fsanitize=thread",
    "--param=tsan-instrument-func-entry-exit=0",
    # -fsanitize=thread, whose calls the emulator answers, finds accesses outside of everything and misaligned ones
    "-fsanitize=bounds,integer-divide-by-zero,float-cast-overflow",
    "-ftrivial-auto-var-init=pattern",
]
CODE = {False: FAST, True: CHECKED}
SUFFIXES = {False: ".fast.so", True: ".checked.so"}  # as in device/launch.cpp


class EmulatorError(Exception):
    """What the emulator found wrong in a launch."""


@dataclass(frozen=True)
class Run:
    """A way to run launches.

    If `checked`, every access is examined. If `adverse`, functions are off by as many ulps as CUDA's manual allows, and
    tensor cores cut sums off. If `deferred`, streams work as late as a device may.
    """

    order: Order = "random"
    seed: int = 1
    checked: bool = False
    adverse: bool = False
    deferred: bool = False

    def __str__(self) -> str:
        words = [self.order if self.order != "random" else f"random {self.seed}"]
        return ", ".join(words + [name for name in ("checked", "adverse", "deferred") if getattr(self, name)])


class Gpu:
    """The emulated GPU of this process; `folder` keeps its two libraries and all compiled kernels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        make_libraries(folder)
        self.driver = ctypes.CDLL(str(folder / DRIVER), ctypes.RTLD_GLOBAL)
        self.runtime = folder / RUNTIME
        ctypes.CDLL(str(self.runtime), ctypes.RTLD_GLOBAL)
        self.driver.emulator_set.argtypes = (ctypes.c_int, ctypes.c_uint64, *[ctypes.c_int] * 3)
        for name in ("emulator_error", "emulator_report"):
            getattr(self.driver, name).restype = ctypes.c_char_p
        self._compiler = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_int)(self._compile)
        self.driver.emulator_set_compiler(self._compiler)

    def be(self, arch: str) -> None:
        """Be a device of this architecture, such as sm_90a, for those who ask."""
        self.driver.emulator_set_capability(int(arch[3:].removesuffix("a")) // 10)

    def set(self, run: Run) -> None:
        """Launch as `run` says from now on; if with checks, on tensors that are allocated from now on."""
        self.driver.emulator_finish_all()
        self.driver.emulator_drop_scratch()
        self.driver.emulator_set(ORDERS.index(run.order), run.seed, run.checked, run.adverse, run.deferred)

    def module(self, source: str) -> bytes:
        """What stands for the machine code of a source, which is compiled when it is first launched."""
        return MARK + str(_written(self.folder, source)).encode() + b"\0"

    def _compile(self, source: bytes, checked: int) -> int:
        """Compile a rewritten source; the emulator calls this where it finds no library."""
        return _compile_library(source.decode(), checked=bool(checked))

    def launch(
        self, module: bytes, kernel: str, blocks: int, cluster: int, threads: int, pointers: Sequence[int]
    ) -> None:
        """Launch a kernel without TVM, in clusters of so many blocks; raises `EmulatorError` with what was found."""
        arguments = (ctypes.c_void_p * len(pointers))(*pointers)
        base = module.removeprefix(MARK).rstrip(b"\0")
        if self.driver.emulator_launch(base, kernel.encode(), blocks, cluster, threads, arguments, len(pointers)):
            raise EmulatorError(self.error)

    @property
    def error(self) -> str:
        """What was found in the last launch, with lines of the source; empty if nothing was."""
        return _with_lines(self.driver.emulator_error().decode())

    def report(self) -> dict[str, float]:
        """Counters, and as `seconds:KERNEL` the time of each kernel, since the last call."""
        lines = self.driver.emulator_report().decode().splitlines()
        return {name: float(number) for name, number in (line.split(" ") for line in lines)}


def compiled_module(folder: Path, source: str) -> bytes:
    """What stands for the machine code of a source, compiled already, so that any process can launch it."""
    base = _written(folder, source)
    if _compile_library(str(base), checked=False) != 0:
        raise EmulatorError(f"g++ cannot compile {base}.cpp")
    return MARK + str(base).encode() + b"\0"


def _written(folder: Path, source: str) -> Path:
    """Where a rewritten source lies, without the suffix."""
    base = folder / hashlib.sha256(source.encode()).hexdigest()[:16]
    if not base.with_suffix(".cpp").is_file():
        _write(base.with_suffix(".cu"), source)
        _write(base.with_suffix(".cpp"), rewritten(source))
    return base


def _compile_library(base: str, *, checked: bool) -> int:
    """Compile a rewritten source; returns the compiler's status."""
    library = base + SUFFIXES[checked]
    unfinished = f"{library}.{os.getpid()}"
    # without the sanitizers' libraries, in whose place the emulator is
    command = ["g++", *KERNELS, *CODE[checked], "-nostdlib", "-o", unfinished, f"{base}.cpp", "-lm"]
    status = subprocess.run(command, check=False).returncode
    if status == 0:
        os.replace(unfinished, library)
    return status


def make_libraries(folder: Path) -> None:
    """Compile the stand-ins for NVIDIA's libraries, unless `folder` has them."""
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        if (folder / RUNTIME).is_file():
            return
        files = {name: sorted(map(str, (HERE / "device").glob(f"{name}.cpp"))) for name in ("*", "runtime")}
        driver = [file for file in files["*"] if file not in files["runtime"]]
        _link([*driver, "-ldl"], folder / DRIVER)
        exports = folder / "exports"
        exports.write_text(f"{RUNTIME} {{ global: cuda*; local: *; }};\n")  # TVM asks for symbols of this version
        search = [f"-L{folder}", f"-l:{DRIVER}", f"-Wl,-rpath,{folder}", f"-Wl,--version-script={exports}"]
        _link([*files["runtime"], *search], folder / RUNTIME)


def _link(arguments: Sequence[str], library: Path) -> None:
    subprocess.run(["g++", *DEVICE, f"-Wl,-soname,{library.name}", "-o", str(library), *arguments], check=True)


def _write(path: Path, text: str) -> None:
    """Write a file that other processes see only when it is complete."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def _with_lines(text: str) -> str:
    """The text with a line of a source in place of each address in a compiled one."""

    def line(match: re.Match[str]) -> str:
        command = ["addr2line", "-e", match[1], match[2]]
        found = subprocess.run(command, capture_output=True, text=True, check=False).stdout.split(" ")[0].strip()
        return Path(found).name

    return re.sub(r"(/\S+\.so)\+(0x[0-9a-f]+)", line, text)
