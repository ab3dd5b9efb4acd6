"""`python -m cluster.bench ARTIFACT`: what a cluster loses, keeps together, and costs, on two nodes of this machine.

The model takes a fixed time for each call and computes nothing, so that two cores do not hide the rest; the artifact
gives the tokenizer and the format of conversations.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from rich.table import Table

from build.bench.served_process import Served
from build.bench.serving_load import LoadWorkload
from build.bench.serving_report import levels_table
from cluster.bench.affinity import measure_affinity
from cluster.bench.losses import Losses, kill_one, measure
from cluster.bench.overhead import later_first_token_ms, measure_overhead, speed_ratio
from cluster.bench.paced_model import Pace, open_paced
from cluster.local import local_cluster, replicas, run, start_serving
from cluster.serving.application import application
from cluster.serving.settings import ClusterSettings, cluster_settings
from export.console import console, output
from runtime.artifact.folder import read_manifest
from runtime.errors import UserError, run_command
from runtime.server.running.served_model import ServedModel

MODEL = "measured"
PACE = Pace(slots=4, step_seconds=0.02, token_seconds=0.0002)
CLIENTS, TOKENS = 6, 24
CONVERSATIONS, TURNS = 8, 5
LOAD_CLIENTS, LOAD_PROMPT, LOAD_TOKENS = (1, 4), 64, 64
SCALING_SECONDS = 60.0  # until a number of replicas is reached
AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 4,
    "look_back_period_s": 1,
    "metrics_interval_s": 0.5,
    "policy": {"policy_function": "cluster.serving.scaling:by_slots"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and print the tables; returns the exit status."""
    args = _parser().parse_args(argv)
    with local_cluster(nodes=2, cpus=2):
        address = start_serving()
        port = int(address.rpartition(":")[2])
        deploy = partial(_deploy, partial(open_paced, args.artifact, PACE))
        lost = partial(_lost, address, args.requests)
        deploy(num_replicas=2)
        console.print("affinity ...", style="dim")
        affinity = measure_affinity(port, MODEL, clients=CONVERSATIONS, turns=TURNS, tokens=TOKENS)
        console.print("losses ...", style="dim")
        losses = [
            lost("one of two replicas killed", change=lambda: kill_one(address, MODEL)),
            lost("both replaced by others", change=lambda: deploy(request_seconds=599.0, num_replicas=2)),
        ]
        deploy(num_replicas=None, autoscaling_config=AUTOSCALING)
        losses.append(lost("one replica becomes two", change=lambda: _wait_for(address, 2)))
        console.print("waiting until the autoscaler ends a replica ...", style="dim")
        few = args.requests // 4  # one client alone takes long
        losses.append(_lost(address, few, "two replicas become one", lambda: _wait_for(address, 1), clients=1))
        console.print("overhead ...", style="dim")
        deploy(num_replicas=1)
        workload = _workload(args)
        rounds = measure_overhead(args.artifact, PACE, Served(port, MODEL, 0), workload, args.rounds)
    output.print(_losses_table(losses))
    output.print(
        f"affinity: {affinity.hits} of {affinity.turns} later turns of {CONVERSATIONS} conversations "
        f"({affinity.rate:.0%}) came to the replica of the turn before; {affinity.replicas} replicas answered"
    )
    output.print(levels_table(rounds))
    for clients in workload.clients:
        output.print(
            f"{clients} clients: {speed_ratio(rounds, clients):.2f} of one box's tokens per second, "
            f"first token {later_first_token_ms(rounds, clients):.1f} ms later"
        )
    return 0


def _lost(address: str, requests: int, what: str, change: Callable[[], int], clients: int = CLIENTS) -> Losses:
    return measure(what, address, MODEL, change, count=requests, clients=clients, tokens=TOKENS)


def _deploy(open_model: Callable[[], ServedModel], *, request_seconds: float = 600.0, **options: object) -> int:
    run(application({MODEL: open_model}, _settings(request_seconds), options))
    return 0


def _settings(request_seconds: float) -> ClusterSettings:
    model = {"artifact": MODEL, "server": {"speculate": False}}
    return cluster_settings({"models": {MODEL: model}, "allow_no_keys": True, "request_seconds": request_seconds})


def _wait_for(address: str, count: int) -> int:
    """Wait until the autoscaler has made the number of replicas so many; returns 0, as it takes nothing away."""
    deadline = time.monotonic() + SCALING_SECONDS
    while len(replicas(address, MODEL)) != count:
        if time.monotonic() > deadline:
            raise UserError(f"after {SCALING_SECONDS:g} s the autoscaler has not made it {count} replicas")
        time.sleep(0.2)
    return 0


def _workload(args: argparse.Namespace) -> LoadWorkload:
    vocabulary = read_manifest(args.artifact).model.vocab_size
    return LoadWorkload(LOAD_CLIENTS, LOAD_PROMPT, LOAD_TOKENS, args.load_requests, vocabulary, LOAD_PROMPT)


def _losses_table(losses: Sequence[Losses]) -> Table:
    table = Table(title="what is lost")
    for header in ("what happened", "requests", "complete", "error event", "refused", "cut off", "in flight", "wrong"):
        table.add_column(header, justify="left" if header == "what happened" else "right")
    for each in losses:
        kinds = [str(each.kinds.get(kind, 0)) for kind in ("complete", "error event", "refused", "cut off")]
        table.add_row(each.what, str(each.requests), *kinds, str(each.in_flight), str(each.wrong_texts))
    return table


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.bench", description=__doc__)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument("--requests", type=int, default=200, metavar="N", help="during each change (default: 200)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of the overhead (default: 3)")
    parser.add_argument("--load-requests", type=int, default=4, metavar="N", help="of each client in a round")
    return parser


if __name__ == "__main__":
    run_command(main)
