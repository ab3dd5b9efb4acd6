"""One library for each CPU level of a target: the same functions, with every kernel made for the level.

Each is compiled in a process of its own, as many at a time as there are cores: making kernels is Python's work, and
LLVM's options, on which correct code depends, belong to a process. Such a process (`python -m
build.tvm_stage.level_libraries`) reads its task from standard input and makes the kernels. Then it prints their
fingerprint and waits to hear whether it shall compile them, since a level whose kernels are all the same as those of a
lower one is left out. It ends if the process that started it does.
"""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from build.compiler import tvm, tvm_ffi
from build.tvm_stage.dispatch import KernelSource, with_kernels
from build.tvm_stage.lower import write_library
from export.peak_memory import collect_rarely
from export.stage import ROOT
from runtime.artifact.consistency import library_file
from runtime.artifact.manifest import TargetSpec
from runtime.errors import UserError, run_command

COMPILE = b"compile\n"


@dataclass(frozen=True)
class LevelTask:
    """A library that is to be written."""

    module: str  # after all passes, with kernels for the lowest level, as TVM's JSON
    kernels: tuple[KernelSource, ...]
    remade: bool  # whether the kernels are to be made for this level; else they are those of the module
    spec: TargetSpec  # with this level alone
    library: Path


def write_libraries(
    module: tvm.IRModule,
    kernels: Sequence[KernelSource],
    spec: TargetSpec,
    folder: Path,
    finished: Callable[[], None],
) -> None:
    """Write the library of every level of `spec` into `folder`, but of those at which no kernel changes.

    `module` is as `lower.with_passes` returns it; `finished` is called as each level is done. Raises `UserError` if one
    cannot be compiled.
    """
    text = tvm.ir.save_json(module)
    fingerprints: list[Future[bytes]] = [Future() for _ in spec.levels]

    def write(number: int) -> None:
        level = spec.levels[number]
        task = LevelTask(text, tuple(kernels), number > 0, spec.at(level), folder / library_file(spec, level))
        try:
            _compile_unless_known(task, fingerprints[number], fingerprints[:number])
        except BaseException as error:
            if not fingerprints[number].done():
                fingerprints[number].set_exception(error)
            raise
        finished()

    # Threads take the levels in order, so whatever a level waits for has begun.
    with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as threads:
        list(threads.map(write, range(len(spec.levels))))


def environment() -> dict[str, str]:
    """The environment of a task's process, which finds this project's modules from whatever folder it is in."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}


def _compile_unless_known(task: LevelTask, own: "Future[bytes]", lower: Sequence["Future[bytes]"]) -> None:
    """Run one task's process; `own` receives the fingerprint of its kernels, `lower` has those of lower levels."""
    command = [sys.executable, "-m", "build.tvm_stage.level_libraries"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            pickle.dump(task, process.stdin)
            process.stdin.flush()
            fingerprint = process.stdout.readline()
            if not fingerprint:
                raise BrokenPipeError
            own.set_result(fingerprint)
            if all(other.result() != fingerprint for other in lower):
                process.stdin.write(COMPILE)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it has ended, and says why
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise UserError(
            f"compiling for the cpu level {task.spec.cpu} ended with status {process.returncode}; "
            "its own message is above"
        )


def main() -> int:
    """Do the task on standard input; returns the exit status."""
    collect_rarely()
    task: LevelTask = pickle.load(sys.stdin.buffer)
    module = tvm.ir.load_json(task.module)
    if task.remade:
        module = with_kernels(module, task.kernels, task.spec)
    made = [module[kernel.name] for kernel in task.kernels]
    print(*(tvm_ffi.structural_hash(function) for function in made), flush=True)
    if sys.stdin.buffer.readline() == COMPILE:
        write_library(module, task.spec, task.library)
    return 0


if __name__ == "__main__":
    run_command(main)
