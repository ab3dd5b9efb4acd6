"""`python -m cluster.bench.bare_server ARTIFACT`: a paced model behind the server of one box, without a cluster."""

import argparse
import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cluster.bench.paced_model import Pace, open_paced
from runtime.errors import run_command
from runtime.server.process import address_of, bound_socket, serve_until_signal
from runtime.server.service import Service
from runtime.server.settings import ServerSettings


def main(argv: Sequence[str] | None = None) -> int:
    """Serve at a free port until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m cluster.bench.bare_server", description=__doc__)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="whose tokenizer and format are used")
    parser.add_argument("name", metavar="NAME", help="of the model")
    parser.add_argument("pace", nargs=3, type=float, metavar="PACE", help="slots, seconds a step, seconds a token")
    args = parser.parse_args(argv)
    slots, step_seconds, token_seconds = args.pace
    pace = Pace(int(slots), step_seconds, token_seconds)
    settings = ServerSettings(port=0, speculate=False)
    service = Service(args.name, partial(open_paced, args.artifact, pace), settings)
    listening = bound_socket(settings.host, settings.port)
    told = partial(print, f"{args.name} is served at {address_of(settings, listening)}/", flush=True)
    asyncio.run(serve_until_signal(service, None, listening, told))
    return 0


if __name__ == "__main__":
    run_command(main)
