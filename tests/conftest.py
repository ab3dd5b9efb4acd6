"""Fixtures that several test files share."""

import build.compiler  # noqa: F401, I001 (before torch, and before the engine loads the runtime alone: then one process can hold all three)

import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from tests.helpers.artifacts import Compiled, compiled


def pytest_configure(config: pytest.Config) -> None:
    """One core a worker: thread pools that wait for each other's cores cost minutes. Ctrl-C works, even where a shell's `&` has switched it off."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    worker = getattr(config, "workerinput", {}).get("workerid")
    if worker is not None:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})
        torch.set_num_threads(1)
        os.environ["TVM_NUM_THREADS"] = "1"  # or a kernel that runs before any engine would start a pool for all cores


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder that all processes of this test run see (pytest-xdist gives each worker a folder inside it)."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if hasattr(request.config, "workerinput") else base


@pytest.fixture(scope="session")
def compile_case(shared_folder: Path) -> Callable[[str], Compiled]:
    """`compile_case(name)` gives one of `tests.helpers.artifacts.CASES`, compiled at its first use."""
    return cache(lambda name: compiled(name, shared_folder / "compiled"))
