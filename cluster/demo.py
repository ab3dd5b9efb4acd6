"""`python -m cluster.demo ARTIFACT`: the artifact on two Ray nodes of this machine, asked through each of them."""

import argparse
import json
import signal
import sys
import threading
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from cluster.local import local_cluster, replicas, run, start_serving
from cluster.serving.application import of_artifacts
from cluster.serving.settings import cluster_settings
from runtime.artifact.folder import read_manifest
from runtime.errors import UserError, run_command

QUESTIONS = (  # so many that each replica has surely been asked one
    "What is the capital of France?",
    "Name three colours.",
    "What is two plus two?",
    "Who wrote Hamlet?",
    "What do cows eat?",
    "How many legs has a spider?",
    "What is the opposite of cold?",
    "Where does the sun rise?",
    "What is ice made of?",
    "Which month comes after May?",
)
ANSWER_SECONDS = 120.0
REAL_CLUSTER = """
On a real cluster, on every node: unpack the shipped file, install it, and add requirements/cluster.lock and cluster/;
then on the first node `ray start --head`, on the others `ray start --address=FIRST:6379`, and once
`serve deploy deploy/ray/serve.yaml`. docs/deployment.md has each step."""


def main(argv: Sequence[str] | None = None) -> int:
    """Start, ask, tell, and end; returns the exit status."""
    args = _parser().parse_args(argv)
    name = read_manifest(args.artifact).name
    print("starting two nodes ...", file=sys.stderr)
    with local_cluster(nodes=2, cpus=1):
        address = start_serving(args.port)
        models = {name: {"artifact": str(args.artifact.resolve())}}
        settings = cluster_settings({"models": models, "allow_no_keys": True})
        run(of_artifacts(settings, {"num_replicas": 2, "max_replicas_per_node": 1}))
        _ask_each(address, name)
        print(f"\n{name} is served at {address}/ (open it in a browser); {address}/replicas shows the replicas")
        print(_curl(address, name))
        print(REAL_CLUSTER, flush=True)
        if not args.once:
            print("\nCtrl-C ends both nodes", flush=True)
            _wait_for_end()
    return 0


def _ask_each(address: str, name: str) -> None:
    """Ask until a replica on each node has answered; raises `UserError` if one never does."""
    nodes = {each.replica: each.node for each in replicas(address, name)}
    answered: set[str] = set()
    for question in QUESTIONS:
        replica, text = _ask(address, name, question)
        if replica not in answered:
            print(f"\nnode {nodes.get(replica)}, replica {replica}: {question}\n{text}")
        answered.add(replica)
        if answered >= set(nodes):
            return
    raise UserError(
        f"of the replicas {', '.join(nodes)}, only {', '.join(answered)} have answered; look at {address}/replicas"
    )


def _ask(address: str, name: str, question: str) -> tuple[str, str]:
    """The replica that answered, and its text."""
    body = json.dumps(_body(name, question)).encode()
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", body, {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=ANSWER_SECONDS) as answer:
        return answer.headers["x-replica"], json.load(answer)["choices"][0]["message"]["content"]


def _body(name: str, question: str) -> dict[str, object]:
    return {"model": name, "messages": [{"role": "user", "content": question}], "max_tokens": 48, "temperature": 0}


def _curl(address: str, name: str) -> str:
    asked = json.dumps(_body(name, "Hello"))
    return f"curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{asked}'"


def _wait_for_end() -> None:
    """Wait for Ctrl-C or SIGTERM."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ended.wait()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m cluster.demo", description=__doc__)
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument("--port", type=int, metavar="PORT", help="port to listen at (default: a free one)")
    parser.add_argument("--once", action="store_true", help="end after the first answers, not at Ctrl-C")
    return parser


if __name__ == "__main__":
    run_command(main)
