"""Fixtures that several test files share, and what a run of tests does first."""

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.helpers.artifacts import Compiled

TESTS = Path(__file__).parent
# Rooms whose tests need neither TVM nor torch, which take seconds to load.
LIGHT_ROOMS = ("export/configuration", "helpers", "project", "runtime/text")
# Files that take longest, by CPU time. They are handed out before all others, in this order, so that no worker is left
# with one of them when the rest is done.
LONGEST_FIRST = (
    "whole/test_smollm2_tokens.py",
    "whole/test_smollm2_quality.py",
    "build_stage/kernels/test_cpu.py",
    "whole/test_family_parity.py",
    "build_stage/test_compile_resume.py",
    "build_stage/tvm_stage/test_cuda_serial.py",
    "build_stage/tvm_stage/test_cuda_7b.py",
    "build_stage/kernels/test_cuda.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """One core a worker: thread pools that wait for each other's cores cost minutes. Ctrl-C works, even where a shell's `&` has switched it off."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker is not None:
        cores = sorted(os.sched_getaffinity(0))
        # torch, loaded later, has as many threads as the process has cores
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        os.environ["TVM_NUM_THREADS"] = "1"  # or a kernel that runs before any engine would start a pool for all cores


def pytest_collectstart(collector: pytest.Collector) -> None:
    """TVM's compiler before torch and before an engine's runtime without it: then one process can hold all three."""
    if isinstance(collector, pytest.Module) and collector.path.parent.relative_to(TESTS).as_posix() not in LIGHT_ROOMS:
        import build.compiler  # noqa: F401


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, all others in their own order."""
    order = {TESTS / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder that all processes of this test run see (pytest-xdist gives each worker a folder inside it)."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base


@pytest.fixture(scope="session")
def compile_case(shared_folder: Path) -> Callable[[str], "Compiled"]:
    """`compile_case(name)` gives one of `tests.helpers.artifacts.SHARED`, compiled at its first use."""
    from tests.helpers.artifacts import compiled

    return cache(lambda name: compiled(name, shared_folder / "compiled"))
