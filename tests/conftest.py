"""Fixtures shared by several test files, and the setup of a test run."""

import gc
import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.emulator.process import GpuProcess
    from tests.helpers.artifacts import Compiled

TESTS = Path(__file__).parent
# Rooms whose tests need neither TVM nor torch, both of which take seconds to load.
LIGHT_ROOMS = ("emulator", "export/configuration", "fuzz", "helpers", "project", "runtime/text")
# The files that take longest, by CPU time or, in the last lines, by waiting for other processes. They are handed out
# before all others, in this order, so that no worker is still busy with one of them when the rest is done.
LONGEST_FIRST = (
    "whole/test_smollm2_tokens.py",
    "whole/test_random_schedules.py",
    "whole/test_smollm2_quality.py",
    "build_stage/kernels/test_cpu.py",
    "whole/test_family_parity.py",
    "build_stage/test_compile_resume.py",
    "build_stage/tvm_stage/test_cuda_serial.py",
    "build_stage/tvm_stage/test_cuda_7b.py",
    "build_stage/kernels/test_cuda.py",
    "cluster/serving/test_cluster.py",
    "deploy/container/test_image.py",
    "cluster/serving/test_commands.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Give each worker one core: thread pools that wait for each other's cores cost minutes.

    Ctrl-C works even where a shell's `&` has disabled it. Nothing that is collected is garbage, so the collector waits
    for `pytest_collection_finish`.
    """
    gc.disable()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker is not None:
        cores = sorted(os.sched_getaffinity(0))
        # torch, loaded later, starts as many threads as the process has cores
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        # otherwise a kernel that runs before any engine would start a pool for all cores
        os.environ["TVM_NUM_THREADS"] = "1"


def pytest_collectstart(collector: pytest.Collector) -> None:
    """Load TVM's compiler before torch, and before the engine loads only TVM's runtime.

    In that order, one process can hold all three.
    """
    if isinstance(collector, pytest.Module) and collector.path.parent.relative_to(TESTS).as_posix() not in LIGHT_ROOMS:
        import build.compiler  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest files first, all others in their own order."""
    order = {TESTS / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


def pytest_collection_finish() -> None:
    """Spare the collector what stays until the end: torch, TVM and transformers are a million objects.

    Looking through them again and again would take a sixth of a worker's time.
    """
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder shared by all processes of this test run (pytest-xdist gives each worker a folder inside it)."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base


@pytest.fixture(scope="session")
def gpu_process(shared_folder: Path) -> Iterator["GpuProcess"]:
    """A process with the emulated GPU."""
    from tests.emulator.process import GpuProcess

    process = GpuProcess(shared_folder / "emulator")
    yield process
    process.close()


@pytest.fixture(scope="session")
def compile_case(shared_folder: Path) -> Callable[[str], "Compiled"]:
    """`compile_case(name)` returns one of `tests.helpers.artifacts.SHARED`, compiled on first use."""
    from tests.helpers.artifacts import compiled

    return cache(lambda name: compiled(name, shared_folder / "compiled"))
