"""A Ray cluster of two nodes with Ray Serve, shared by the tests of one file."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from ray import serve

from cluster.bench.paced_model import open_paced
from cluster.local import NAME, local_cluster, run, start_serving
from cluster.serving.application import application
from cluster.serving.settings import cluster_settings
from tests.helpers.cluster import port_of
from tests.helpers.serving import Running

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


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where clients ask. The nodes end with the file: a process has one cluster at a time, and each file its own."""
    os.environ.update(QUICK_FIGURES)
    with local_cluster(nodes=2, cpus=4):
        yield start_serving()


@pytest.fixture(scope="session", autouse=True)
def every_core() -> None:
    """A worker of pytest has one core, which the nodes would inherit."""
    os.sched_setaffinity(0, range(os.cpu_count() or 1))


@pytest.fixture
def deploy_opened(address):
    """Deploys models by name, each with what opens it; returns a client of the cluster."""

    def deploy(openers, *, settings=None, **options):
        models = {name: {"artifact": "opened", "server": {"speculate": False}} for name in openers}
        own = cluster_settings({"models": models, "allow_no_keys": True, **(settings or {})})
        run(application(openers, own, {"ray_actor_options": {"num_cpus": 0.1}, **options}))
        return Running(None, port_of(address))

    yield deploy
    serve.delete(NAME)


@pytest.fixture
def deploy(deploy_opened, artifact):
    """As `deploy_opened`, each model with its pace."""

    def deploy(paces, **options):
        return deploy_opened({name: partial(open_paced, artifact, pace) for name, pace in paces.items()}, **options)

    return deploy
