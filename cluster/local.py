"""A Ray cluster of several nodes on this machine alone, for demonstrations, measurements and tests."""

import io
import logging
import os
import socket
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import msgspec
import ray
from ray import serve
from ray.cluster_utils import Cluster
from ray.serve import Application
from ray.serve.schema import DeploymentStatus

from cluster.serving.model import ReplicaState
from cluster.serving.overview import ModelState
from runtime.errors import UserError

LOOPBACK = "127.0.0.1"
NODE_ADDRESS, FIRST_NODE = "127.0.0.{}", 2  # Ray takes 127.0.0.1 for another address of the machine
ROOT = Path(__file__).parents[1]
NAME = "models"  # of the application
ANSWER_SECONDS = 10.0  # that a front has to tell of its replicas
STORE_BYTES = 80 * 2**20  # of each node's object store, which nothing of ours uses


@contextmanager
def local_cluster(nodes: int, cpus: int, dashboard_port: int | None = None) -> Iterator[Cluster]:
    """Start nodes that believe to have so many CPUs each; all ends with the context.

    dashboard_port: where `serve deploy` sends its file; there is no dashboard without a port.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    node = {"num_cpus": cpus, "object_store_memory": STORE_BYTES}
    dashboard = {"include_dashboard": dashboard_port is not None, "dashboard_host": LOOPBACK}
    head = {**node, **dashboard, "node_ip_address": NODE_ADDRESS.format(FIRST_NODE), "dashboard_port": dashboard_port}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for number in range(1, nodes):
            cluster.add_node(node_ip_address=NODE_ADDRESS.format(FIRST_NODE + number), **node)
        ray.init(address=cluster.address, log_to_driver=False, configure_logging=False)
        yield cluster
    finally:
        with redirect_stdout(io.StringIO()):  # where Ray reports that it ended its own controller as a failure of it
            serve.shutdown()
            ray.shutdown()
        cluster.shutdown()


def start_serving(port: int | None = None) -> str:
    """Start Ray Serve's proxy; returns the address."""
    port = port or free_port()
    serve.start(http_options={"host": LOOPBACK, "port": port}, proxy_location="HeadOnly")
    return f"http://{LOOPBACK}:{port}"


def run(app: Application) -> None:
    """Deploy an application, also over one that runs, and wait until it takes requests.

    Raises `UserError` with what a replica said if none can be started.
    """
    try:
        serve.run(app, name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise UserError(f"{error} {_reasons()}") from error


def replicas(address: str, model: str) -> list[ReplicaState]:
    """The replicas of a model, as the front at an address tells of them."""
    with urllib.request.urlopen(f"{address}/replicas", timeout=ANSWER_SECONDS) as answer:
        states = msgspec.json.decode(answer.read(), type=list[ModelState])
    return next(state.replicas for state in states if state.model == model)


def _reasons() -> str:
    """The last lines of what the replicas said that could not be started."""
    deployments = serve.status().applications[NAME].deployments
    said = {each.message.strip() for each in deployments.values() if each.status == DeploymentStatus.DEPLOY_FAILED}
    return " ".join(sorted(message.rpartition("\n")[2] for message in said))


def free_port() -> int:
    """A port of this machine that nothing listens to."""
    with socket.socket() as found:
        found.bind((LOOPBACK, 0))
        return found.getsockname()[1]
