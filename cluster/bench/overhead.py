"""What Ray Serve costs: the same paced model behind the server of one box and behind a cluster, in turns."""

import asyncio
import sys
from pathlib import Path
from statistics import median

from build.bench.served_process import Served, served_by
from build.bench.serving_load import LoadWorkload, measure_level
from build.bench.serving_report import Rounds
from cluster.bench.paced_model import Pace
from runtime.benchmarks.spread import Spread

BARE, CLUSTER = "one box", "Ray Serve"
STALL_SECONDS = 0.1  # the server's default


def measure_overhead(artifact: Path, pace: Pace, cluster: Served, workload: LoadWorkload, rounds: int) -> Rounds:
    """Measure both servers in turns; the first requests, which warm them up, are not counted."""
    command = [sys.executable, "-m", "cluster.bench.bare_server", str(artifact), cluster.model]
    command += [str(value) for value in (pace.slots, pace.step_seconds, pace.token_seconds)]
    make, found = workload.prompts(), Rounds(STALL_SECONDS)
    with served_by(command, cluster.model) as bare:
        servers = {BARE: bare, CLUSTER: cluster}
        for served in servers.values():
            asyncio.run(measure_level(served, 1, workload, make))
        for _ in range(rounds):
            for clients in workload.clients:
                for name, served in servers.items():
                    found.add(name, asyncio.run(measure_level(served, clients, workload, make)))
    return found


def speed_ratio(rounds: Rounds, clients: int) -> Spread:
    """Tokens per second of the cluster over those of one box, round by round."""
    pairs = zip(rounds.levels[BARE][clients], rounds.levels[CLUSTER][clients], strict=True)
    return Spread.of([there.tok_s / here.tok_s for here, there in pairs])


def later_first_token_ms(rounds: Rounds, clients: int) -> Spread:
    """Milliseconds by which the median first token comes later than from one box, round by round."""
    pairs = zip(rounds.levels[BARE][clients], rounds.levels[CLUSTER][clients], strict=True)
    return Spread.of([1e3 * (median(there.ttft_s) - median(here.ttft_s)) for here, there in pairs])
