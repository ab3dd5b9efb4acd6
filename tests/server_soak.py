"""`python -m tests.server_soak --minutes N [--artifact FOLDER]`: random clients against a server for so long.

Afterwards every slot is idle, nothing waits, /health was 200 throughout, whole answers are those of the same requests
alone, and the server holds no more memory than after its first minutes. A seed that fails is printed.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from build.bench.served_process import our_server
from runtime.artifact.folder import read_manifest
from tests.helpers.server_soak import Soak, check_answers, check_idle, run_clients

MODEL = "soaked"
WARM_SHARE = 0.2  # of the time, after which memory is to be flat: 2 minutes of 10
CHECKED = 300  # answers that are asked for again
SNAPSHOT_MEGABYTES = 16
# Memory that may come after that: snapshots, which need not be full by then, the sockets and bodies of the clients of a
# moment, and pages that the allocator keeps for them.
MOST_GROWTH = SNAPSHOT_MEGABYTES * 10**6 + 16 * 2**20


def resident(pid):
    """Bytes that a process holds."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.server_soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--artifact", type=Path, help="an artifact that you have compiled, in place of a tiny one")
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        artifact = args.artifact
        if artifact is None:
            from tests.helpers.artifacts import compiled  # loads TVM's compiler

            artifact = compiled("int8", Path(name)).artifact
        soak, memory = soaked(artifact, 60 * args.minutes, args.clients, args.seed)
    print(f"seed {args.seed}: {sum(soak.counts.values())} acts {soak.counts}, {len(soak.complete)} whole answers")
    print(f"memory after {WARM_SHARE:.0%}: {memory[0] / 2**20:.1f} MiB, at the end: {memory[1] / 2**20:.1f} MiB")
    for failure in soak.failures[:20]:
        print(failure)
    return 1 if soak.failures else 0


def soaked(artifact, seconds, clients, seed):
    """Run the clients against a server of this artifact; returns what they saw, and the memory then and at the end."""
    manifest = read_manifest(artifact)
    with our_server(artifact, MODEL, {"max_queued": 16, "snapshot_megabytes": SNAPSHOT_MEGABYTES}, threads=2) as served:
        start = time.monotonic()
        soak = Soak(served.port, MODEL, manifest.shape.cache_len, start + seconds)
        samples = []
        run_clients(soak, clients, seed, lambda: samples.append((time.monotonic() - start, resident(served.pid))))
        check_idle(soak)
        check_answers(soak, CHECKED, random.Random(seed))
        check_idle(soak)
        warm = max(size for at, size in samples if at <= max(WARM_SHARE * seconds, samples[0][0]))
        end = resident(served.pid)
        if end - warm > MOST_GROWTH:
            soak.fail(f"memory has grown from {warm} to {end} bytes, expected at most {MOST_GROWTH} more")
    return soak, (warm, end)


if __name__ == "__main__":
    sys.exit(main())
