"""`python -m build.bench.instructions [--arch sm_90a]`: what decode's products ask of a GPU, counted in machine code.

For the products of one row of a 7B layer: what a block takes of a multiprocessor, and the instructions of the longest
loop, for each weight, by the unit that runs them. Needs NVIDIA's disassembler, which `make setup` does not install:

    pip install --no-deps --target out/nvdisasm nvidia-cuda-nvdisasm
    PATH=$PATH:out/nvdisasm/nvidia/cu13/bin .venv/bin/python -m build.bench.instructions
"""

import argparse
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.table import Table

from build.compiler import tvm
from build.kernels.cuda.binding import WARP
from build.kernels.cuda.gemv import gemv_warps
from build.kernels.cuda.linear import linear
from build.kernels.cuda.panel_dot import vectors_of
from build.kernels.shapes import Linear
from build.tvm_stage import cuda
from build.tvm_stage.machine_code import device_code
from build.tvm_stage.target import TVM_TARGETS
from export.console import console, output
from export.weights.format import Storage
from export.weights.table import vector_steps
from runtime.artifact.layouts import PANEL
from runtime.artifact.manifest import KernelUsage, TargetSpec
from runtime.errors import UserError, run_command

FORMATS = {
    "fp16": Storage(dtype="float16"),
    "int8": Storage(dtype="int8"),
    "int4": Storage(dtype="int4", group_size=32),
    "e4m3": Storage(dtype="float8"),
}
EPS = 1e-5
PLAIN = FORMATS["fp16"]
PRODUCTS = {  # of a layer of Mistral-7B and its head
    "wqkv": Linear((1, 1), 6144, 4096, PLAIN, norm_eps=EPS),
    "wo": Linear((1, 1), 4096, 4096, PLAIN, residual=True),
    "w1 and w3": Linear((1, 1), 28672, 4096, PLAIN, norm_eps=EPS, swiglu=True),
    "w2": Linear((1, 1), 4096, 14336, PLAIN, residual=True),
    "head": Linear((1, 1), 32000, 4096, PLAIN, norm_eps=EPS),
}

# Of a multiprocessor; CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
REGISTERS, THREADS = 65536, 2048
SHARED = {"sm_80": 164 * 1024, "sm_90": 228 * 1024, "sm_100": 228 * 1024}
RESERVED = 1024  # bytes of shared memory that a block takes besides its own
REGISTER_STEP = 8  # in which a thread's registers are given out

# Units of a multiprocessor by the opcodes that decode's loops have; what is not listed is "other".
UNITS = {
    **dict.fromkeys(("FFMA", "FADD", "FMUL", "IMAD", "HADD2", "HFMA2", "HMUL2"), "float"),
    **dict.fromkeys(("LOP3", "SHF", "PRMT", "IADD3", "VIADD", "ISETP", "SEL", "MOV", "LEA"), "integer"),
    **dict.fromkeys(("LDS", "STS"), "shared"),
    **dict.fromkeys(("LDG", "STG"), "global"),
}
COLUMNS = ("float", "integer", "shared", "global", "other")
LABEL = re.compile(r"\s*\.(L_x_\d+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?P<opcode>[A-Z][A-Z0-9_.]*)")
BRANCH = re.compile(r"\bBRA\b.*\(\.(L_x_\d+)\)")
WEIGHTS = "LDG.E.128"  # the load of 16 bytes of weights


@dataclass(frozen=True)
class Code:
    """The machine code of one kernel: what a block takes, and the opcodes of its longest loop."""

    usage: KernelUsage
    loop: list[str]

    def units(self, steps: int) -> dict[str, float]:
        """Instructions for a weight by unit, of a loop that loads `steps` weights in 16 bytes."""
        weights = steps * sum(opcode.startswith(WEIGHTS) for opcode in self.loop)
        counts = Counter(UNITS.get(opcode.partition(".")[0], "other") for opcode in self.loop)
        return {unit: counts[unit] / weights for unit in COLUMNS}


def longest_loop(listing: str) -> list[str]:
    """The opcodes of the longest loop in nvdisasm's listing of one kernel; empty without a loop."""
    starts: dict[str, int] = {}
    opcodes: list[str] = []
    loops: list[list[str]] = [[]]
    for line in listing.splitlines():
        if label := LABEL.match(line):
            starts[label[1]] = len(opcodes)
        elif found := INSTRUCTION.match(line):
            opcodes.append(found["opcode"])
            branch = BRANCH.search(line)
            if branch and branch[1] in starts:  # backwards
                loops.append(opcodes[starts[branch[1]] :])
    return max(loops, key=len)


def resident_blocks(usage: KernelUsage, threads: int) -> int:
    """Blocks that a multiprocessor holds at once."""
    registers = -(-usage.registers // REGISTER_STEP) * REGISTER_STEP * threads
    shared = SHARED[usage.arch.removesuffix("a")] // (usage.shared_bytes + RESERVED)
    return min(REGISTERS // registers, shared, THREADS // threads)


def code_of(shape: Linear, arch: str, nvdisasm: str) -> Code:
    """Compile a product of one launch and disassemble it."""
    spec = TargetSpec(kind="cuda", dtype="fp16", cpu="x86-64-v3", cpu_features=(), arch=(arch,))
    module = tvm.IRModule({"kernel": linear(shape, tensor_cores=True).with_attr("global_symbol", "kernel")})
    with TemporaryDirectory() as name:
        folder = Path(name)
        with cuda.toolchain(spec, folder, None):
            tvm.compile(module, TVM_TARGETS["cuda"].make(spec)).export_library(folder / "kernel.so")
        ((machine_code,),) = device_code(folder / "kernel.so")
        (folder / "kernel.cubin").write_bytes(machine_code.code)
        listing = subprocess.run(
            [nvdisasm, "-c", folder / "kernel.cubin"], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        (usage,) = cuda.usage_of(folder)
        return Code(usage, longest_loop(listing))


def rows(arch: str, nvdisasm: str) -> Iterator[list[str]]:
    """The table's rows, each as soon as it is compiled."""
    for name, stored in FORMATS.items():
        for product, plain in PRODUCTS.items():
            shape = replace(plain, weight=stored)
            panels, code = -(-shape.n_out // PANEL), code_of(shape, arch, nvdisasm)
            threads = gemv_warps(panels, vectors_of(stored, shape.k)) * WARP
            units = code.units(vector_steps(stored))
            yield [
                f"{product}, {name}",
                str(panels),
                str(threads),
                str(code.usage.registers),
                str(code.usage.shared_bytes),
                str(resident_blocks(code.usage, threads)),
                f"{sum(units.values()):.2f}",
                *(f"{units[unit]:.2f}" for unit in COLUMNS),
            ]


def main() -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description="Count what decode's products ask of a GPU in their machine code.")
    parser.add_argument("--arch", default="sm_90a", choices=[*SHARED, "sm_90a"], help="default: %(default)s")
    arch = parser.parse_args().arch
    nvdisasm = shutil.which("nvdisasm")
    if nvdisasm is None:
        raise UserError(
            "nvdisasm is not on PATH; pip install --no-deps --target out/nvdisasm nvidia-cuda-nvdisasm, "
            "and add out/nvdisasm/nvidia/cu13/bin to PATH"
        )
    table = Table("product", "blocks", "threads", "registers", "shared", "resident", "instructions", *COLUMNS)
    with console.status("compiling"):
        for row in rows(arch, nvdisasm):
            table.add_row(*row)
    output.print(table)
    return 0


if __name__ == "__main__":
    run_command(main)
