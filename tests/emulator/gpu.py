"""An emulated GPU: the CUDA source that TVM generates, compiled by g++ and run with a fiber for each thread (gpu.cpp says what is checked).

`start()` loads stand-ins for NVIDIA's driver and runtime library into this process, and lets the project's compiler embed a pointer to its source
where machine code would be. From then on TVM's `cuda` device works: modules compile, load, launch, and are captured in graphs.

    fast      -O2, products contracted to fma as nvcc does
    adverse   without fma, exp, sin and cos off by up to 2 ulp, tensor cores that cut their sums off
    checked   -O1 with every access and undefined behaviour reported to the emulator
    checked0  the same at -O0, where no access is optimized away: each happens where the source has it
    asan      -O1 with AddressSanitizer, for local arrays (needs LD_PRELOAD=libasan.so)
"""

import ctypes
import hashlib
import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
WORK = Path(os.environ.get("EMULATOR_FOLDER", HERE.parents[1] / "out" / ".work" / "emulator"))
UNDEFINED = "alignment,bounds,shift,signed-integer-overflow,integer-divide-by-zero,float-cast-overflow,bool,return"
COMMON = [
    "-std=c++20",
    "-march=native",
    "-fno-strict-aliasing",
    "-fPIC",
    "-fvisibility=hidden",
    "-w",
    "-fno-exceptions",
]
CHECKS = [
    "-g1", "-fsanitize=thread", f"-fsanitize={UNDEFINED}", "--param", "tsan-instrument-func-entry-exit=0", "-ftrivial-auto-var-init=pattern",
]  # fmt: skip
MODES = {
    "fast": ["-O2", "-ffp-contract=fast", "-fno-tree-vectorize"],
    "adverse": ["-O2", "-ffp-contract=off", "-fno-tree-vectorize", "-DEMU_ADVERSE"],
    "checked": ["-O1", "-ffp-contract=fast", "-fno-tree-vectorize", *CHECKS],
    "checked0": ["-O0", *CHECKS],
    "asan": ["-O1", "-g1", "-ffp-contract=fast", "-fsanitize=address", "-ftrivial-auto-var-init=pattern"],
}
ORDERS = {"forward": 0, "reverse": 1, "random": 2}
KERNEL = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\((\d+)\) )?(\w+)\(([^)]*)\) *([{;])', re.MULTILINE
)
SHARED = re.compile(r"__shared__ (?:alignas\((\d+)\) )?([\w ]+?) (\w+)\[(\d+)\];")
ASSEMBLY = re.compile(r"__asm__ __volatile__\(\s*((?:\"[^\"]*\"\s*)+):([^;]*)\);")
INSTRUCTIONS = {  # the text of an instruction, to its name and how many operands it writes and reads
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};\\n": (
        4,
        10,
    ),
}


class Settings(ctypes.Structure):
    """`Settings` of gpu.cpp."""

    _fields_ = [
        ("order", ctypes.c_int),
        ("seed", ctypes.c_uint64),
        ("mode", ctypes.c_char * 32),
        ("checks", ctypes.c_int),
        ("only_blocks", ctypes.c_int64),
        ("deferred", ctypes.c_int),
    ]


def transformed(source: str) -> str:
    """A CUDA source as g++ takes it, line by line where it was; ValueError where something is not emulated."""
    rows = {name: (int(bound or 1024), parameters) for bound, name, parameters, _ in KERNEL.findall(source)}
    text = re.sub(r"^ *#include <(cuda\.h|cuda_fp16\.h|mma\.h)>", "", source, flags=re.MULTILINE)
    text = KERNEL.sub(lambda m: m[0] + (" EMU_KERNEL();" if m[4] == "{" else ""), text)
    text = SHARED.sub(lambda m: f"EMU_SHARED({m[2]}, {m[3]}, {m[4]}, {m[1] or 16});", text)
    text = ASSEMBLY.sub(_assembly, text)
    bodies = text[
        KERNEL.search(text).start() :
    ]  # before them are helpers, of which g++ sees those that are not for __CUDA_ARCH__ alone
    for left in ("asm", "__shared__", "cp.async", "__nanosleep", "cooperative_groups"):
        if re.search(rf"\b{re.escape(left)}", bodies):
            raise ValueError(f"the source has a {left} that is not emulated")
    table = []
    for name, (bound, parameters) in rows.items():
        types = [
            re.sub(r"\b(__restrict__|const)\b", "", p).strip().rpartition(" ")[0].strip() for p in parameters.split(",")
        ]
        if not all(t.endswith("*") for t in types):
            raise ValueError(f"{name} has parameters that are no pointers: {parameters}")
        arguments = ", ".join(f"static_cast<{t}>(p[{i}])" for i, t in enumerate(types))
        table.append(
            f'  {{"{name}", [](void **p) __attribute__((no_sanitize("thread"))) {{ {name}({arguments}); }}, {len(types)}, {bound}}},\n'
        )
    head = f'#include "{HERE}/emulator.h"'  # in the empty first line
    assert text.startswith("\n"), "the source begins with an empty line"
    rows_text = "struct emu_kernel { const char *name; void (*run)(void **); int parameters, max_threads; };\n"
    return (
        head
        + text
        + rows_text
        + 'extern "C" __attribute__((visibility("default"))) emu_kernel emu_kernels[];\nemu_kernel emu_kernels[] = {\n'
        + ("".join(table) + "  {nullptr, nullptr, 0, 0}};\n")
    )


def _assembly(match: re.Match) -> str:
    """A call with the operands of an instruction, on as many lines."""
    instruction = "".join(re.findall(r'"([^"]*)"', match[1]))
    if instruction not in INSTRUCTIONS:
        raise ValueError(f"{instruction!r} is not emulated")
    written, read = INSTRUCTIONS[instruction]
    outputs, inputs = (_operands(part) for part in match[2].split("\n      :", 1))
    if ([kind[0] for kind, _ in outputs], len(inputs)) != (["="] * written, read):
        raise ValueError(f"{match[0]} has other operands than expected")
    name = re.sub(r"\W", "_", instruction.split("{")[0])
    return f"emu::{name}(__LINE__, {', '.join(text for _, text in [*outputs, *inputs])});" + "\n" * match[0].count("\n")


def _operands(text: str) -> list[tuple[str, str]]:
    """Constraint and expression of each operand."""
    found, at = [], 0
    while (start := text.find('"', at)) >= 0:
        end = text.index('"', start + 1)
        kind, at = text[start + 1 : end], text.index("(", end)
        depth, first = 0, at
        while True:
            depth += {"(": 1, ")": -1}.get(text[at], 0)
            at += 1
            if depth == 0:
                break
        found.append((kind, text[first:at]))
    return found


class Gpu:
    """The emulated GPU of this process."""

    def __init__(self) -> None:
        WORK.mkdir(parents=True, exist_ok=True)
        driver, runtime, exports = WORK / "libcuda.so.1", WORK / "libcudart.so.13", WORK / "cudart.map"
        if not runtime.is_file() or runtime.stat().st_mtime < (HERE / "gpu.cpp").stat().st_mtime:
            exports.write_text("libcudart.so.13 { global: cuda*; local: *; };\n")
            shared = [
                "g++",
                "-std=c++20",
                "-O3",
                "-march=native",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-shared",
                "-fPIC",
                "-fvisibility=hidden",
            ]
            links = [f"-Wl,--version-script={exports}", f"-L{WORK}", "-l:libcuda.so.1", f"-Wl,-rpath,{WORK}"]
            for library, more in (
                (driver, ["-ldl"]),
                (runtime, ["-DEMU_CUDART", *links]),
            ):  # renamed into place: another process may have it open
                subprocess.run(
                    [*shared, f"-Wl,-soname,{library.name}", "-o", f"{library}.tmp", str(HERE / "gpu.cpp"), *more],
                    check=True,
                )
                os.replace(f"{library}.tmp", library)
        self.driver = ctypes.CDLL(str(driver), ctypes.RTLD_GLOBAL)
        self.runtime_path = runtime
        self.runtime = ctypes.CDLL(str(runtime), ctypes.RTLD_GLOBAL)
        self.driver.emu_settings.restype = ctypes.POINTER(Settings)
        self.driver.emu_report.restype = self.driver.emu_error.restype = ctypes.c_char_p
        self.settings = self.driver.emu_settings().contents
        self.compile_seconds = 0.0
        self._compiler = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_char_p, ctypes.c_char_p)(self._compile)
        self.driver.emu_set_compiler(self._compiler)

    def set(
        self, mode: str = "fast", order: str = "random", seed: int = 1, only_blocks: int = 0, deferred: bool = False
    ) -> None:
        """How kernels are built and run from now on; with checks, allocations must be newer than this."""
        self.driver.emu_flush_all()
        self.settings.deferred = int(deferred)
        self.settings.mode = mode.encode()
        self.settings.order, self.settings.seed, self.settings.only_blocks = ORDERS[order], seed, only_blocks
        self.settings.checks = int(mode.startswith("checked"))
        self.driver.emu_drop_scratch()

    def module(self, source: str) -> bytes:
        """What stands for the machine code of a source."""
        tools = (HERE / "emulator.h").read_text() + Path(__file__).read_text()
        base = WORK / hashlib.sha256((tools + source).encode()).hexdigest()[:16]
        if not base.with_suffix(".cpp").is_file():
            base.with_suffix(".cu").write_text(source)
            base.with_suffix(".cpp").write_text(transformed(source))
        return b"EMU:" + str(base).encode() + b"\0"

    def _compile(self, base: bytes, mode: bytes) -> int:
        start = time.perf_counter()
        name, flags = base.decode(), MODES[mode.decode()]
        unfinished = f"{name}.{os.getpid()}.o"
        links = (
            ["-fsanitize=address"] if mode == b"asan" else []
        )  # none of the other checks' libraries: the emulator is in their place
        for command in (
            ["-c", *COMMON, *flags, "-o", unfinished, f"{name}.cpp"],
            ["-shared", *links, "-o", f"{unfinished}.so", unfinished],
        ):
            result = subprocess.run(["g++", *command], capture_output=True, text=True, check=False)
            if result.returncode != 0:
                print(result.stderr[:4000], file=sys.stderr)
                return 1
        os.unlink(unfinished)
        os.replace(f"{unfinished}.so", f"{name}.{mode.decode()}.so")
        self.compile_seconds += time.perf_counter() - start
        return 0

    def report(self) -> dict:
        """Counters, seconds of each kernel, and what was noted, since the last call of this."""
        found: dict = {"seconds": {}, "notes": []}
        for line in self.driver.emu_report().decode().splitlines():
            word, _, rest = line.partition(" ")
            if word == "seconds":
                name, _, seconds = rest.rpartition(" ")
                found["seconds"][name] = float(seconds)
            elif word == "note":
                found["notes"].append(with_line(rest))
            else:
                found[word] = int(rest)
        return found

    @property
    def error(self) -> str:
        """Of the last launch, with lines of the source."""
        return with_line(self.driver.emu_error().decode())


def with_line(text: str) -> str:
    """Addresses in a build of a kernel as lines of its source."""

    def line(match: re.Match) -> str:
        found = subprocess.run(
            ["addr2line", "-e", match[1], match[2]], capture_output=True, text=True, check=False
        ).stdout.strip()
        return f"{Path(found).stem}.cu:{found.rpartition(':')[2]}"

    return re.sub(r"(/\S+\.so)\+(0x[0-9a-f]+)", line, text)


_gpu: Gpu | None = None


def start(*, exact_scratch: bool = True) -> Gpu:
    """The GPU, in place of whatever this machine has; call it before the project's modules load TVM's CUDA library.

    With `exact_scratch`, what a kernel keeps between its launches lies in allocations of its size, else in those of TVM's pool, which are whole pages.
    """
    global _gpu
    if _gpu is not None:
        return _gpu
    _gpu = gpu = Gpu()
    from build.tvm_stage import cuda, target
    from runtime.engines import cuda_device, tvm_runtime

    find = tvm_runtime.find_library
    for module in (tvm_runtime, cuda_device, cuda):
        module.find_library = lambda name: gpu.runtime_path if name == "libcudart.so.13" else find(name)
    cuda.compile_fatbin = lambda _nvcc, source, _archs: (gpu.module(source), [])
    target.check_machine_code = lambda _library, _archs: None
    cuda.load_tvm_cuda()
    if not exact_scratch:
        return gpu
    import tvm_ffi

    register = ctypes.CDLL(
        str(Path(tvm_ffi.__file__).parent / "lib" / "libtvm_ffi.so")
    ).TVMFFIEnvModRegisterContextSymbol
    for name, own in (
        ("__TVMBackendAllocWorkspace", "emu_scratch_alloc"),
        ("__TVMBackendFreeWorkspace", "emu_scratch_free"),
    ):
        if register(name.encode(), ctypes.cast(getattr(gpu.driver, own), ctypes.c_void_p)) != 0:
            raise RuntimeError(f"{name} cannot be replaced")
    return gpu


@contextmanager
def timed(what: str):
    """Print how long something took."""
    begin = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - begin:.2f} s", flush=True)
