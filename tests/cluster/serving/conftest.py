"""A Ray cluster of two nodes with Ray Serve, shared by the tests of one process."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.local import local_cluster, start_serving

# Ray pushes the figures for its autoscaler every ten seconds by default
QUICK_FIGURES = {
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_RECORD_INTERVAL_S": "0.25",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_RECORD_INTERVAL_S": "0.25",
}


@pytest.fixture(scope="session")
def artifact(compile_case) -> Path:
    return compile_case("int8").artifact


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """Where clients ask."""
    os.environ.update(QUICK_FIGURES)
    with local_cluster(nodes=2, cpus=4):
        yield start_serving()


@pytest.fixture(scope="session", autouse=True)
def every_core() -> None:
    """A worker of pytest has one core, which the nodes would inherit."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
