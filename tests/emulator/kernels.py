"""Kernels of the project on the emulated GPU: `compiled` and `run` in place of those that the project's tests use for the serial form.

As a pytest plugin (`-p on_emulator`, with this folder on PYTHONPATH) it runs `tests/test_build_kernels_cuda.py` on the emulated GPU. EMU_RUNS names
the runs of each call, MODE:ORDER:SEED; those of one mode must give the same bits, and the last one's are what a test gets to see.
"""

import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from tests.emulator import gpu as emulate

GPU = emulate.start()

from build.compiler import tvm  # noqa: E402
from build.kernels.cuda.binding import GPU as ON_GPU  # noqa: E402
from build.tvm_stage import cuda  # noqa: E402
from build.tvm_stage.target import TVM_TARGETS as TARGETS  # noqa: E402
from runtime.artifact.manifest import TargetSpec  # noqa: E402

SPEC = TargetSpec(kind="cuda", dtype="fp16", cpu="x86-64-v3", cpu_features=(), arch=("sm_80",))
RUNS = [
    tuple(run.split(":"))
    for run in os.environ.get("EMU_RUNS", "fast:forward:0 fast:reverse:0 fast:random:1 fast:random:2").split()
]
TOTALS: Counter = Counter()
NOTES: set = set()


class EmulatorError(Exception):
    """What the emulator has found."""


def compiled(function, name="kernel"):
    """A kernel for the emulated GPU, from the source that nvcc would get."""
    with tempfile.TemporaryDirectory() as folder, cuda.toolchain(SPEC, Path(folder), None):
        module = tvm.IRModule({name: function.with_attr("global_symbol", name)})
        return tvm.compile(module, target=TARGETS["cuda"].make(SPEC))[name]


def on_device(array):
    return tvm.runtime.tensor(np.ascontiguousarray(array), tvm.cuda(0))


def call(kernel, tensors):
    """Launch a kernel; EmulatorError with what was found."""
    try:
        kernel(*tensors)
    except Exception as error:  # TVM's, which holds the whole source
        raise EmulatorError(GPU.error or str(error)[:500]) from None


def run(kernel, *arrays):
    """Call a compiled kernel in every way asked for; the arrays as the last call left them."""
    same: dict = {}
    for mode, order, seed in RUNS:
        GPU.set(mode, order, int(seed))
        tensors = [on_device(array) for array in arrays]
        call(kernel, tensors)
        found = [tensor.numpy() for tensor in tensors]
        del tensors
        report = GPU.report()
        NOTES.update(report["notes"])
        TOTALS.update({word: count for word, count in report.items() if isinstance(count, int)})
        TOTALS["seconds"] += sum(report["seconds"].values())
        if mode != "adverse":  # whose noise depends on the order
            first = same.setdefault(mode, found)
            for i, (one, other) in enumerate(zip(first, found, strict=True)):
                if one.tobytes() != other.tobytes():
                    raise EmulatorError(f"parameter {i} depends on the order of threads: {mode} {order} {seed}")
    return found


def pytest_collection_finish(session):
    for module in {item.module for item in session.items}:
        if hasattr(module, "SERIAL"):
            module.SERIAL, module.compiled_serially, module.run = ON_GPU, compiled, run


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"emulator: {RUNS}: {dict(TOTALS)}, g++ {GPU.compile_seconds:.1f} s")
    for note in sorted(NOTES):
        terminalreporter.write_line(f"note: {note}")
