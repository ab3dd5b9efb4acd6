"""What a cluster loses when a replica is killed, when all are replaced, and when their number changes."""

import asyncio
import os
import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from cluster.bench.client import ask_all, chat_body
from cluster.local import replicas


@dataclass(frozen=True)
class Losses:
    """What became of the requests during a change: their kinds, and the texts that were not as they should be."""

    what: str
    requests: int
    kinds: dict[str, int]
    in_flight: int  # on the replica that was killed, at that moment
    wrong_texts: int
    replicas: int  # that answered

    @property
    def lost(self) -> int:
        """Requests without a complete answer."""
        return self.requests - self.kinds.get("complete", 0)


def conversations(model: str, count: int, tokens: int) -> list[bytes]:
    """Different first questions."""
    return [
        chat_body(model, [{"role": "user", "content": f"Tell me story {number}"}], tokens) for number in range(count)
    ]


def measure(
    what: str, address: str, model: str, change: Callable[[], int], *, count: int, clients: int, tokens: int
) -> Losses:
    """Send requests, and let `change` happen in a thread once a third of them is answered.

    `change` returns how many requests were on what it took away. A text is wrong if it is not that which the same
    question got before the change.
    """
    port = int(address.rpartition(":")[2])
    bodies = conversations(model, count, tokens)
    before = {outcome.request: outcome for outcome in asyncio.run(ask_all(port, clients, bodies[: 2 * clients]))}
    changed: list[int] = []
    changing = threading.Thread(target=lambda: changed.append(change()))
    started = threading.Event()

    def after(answered: int) -> None:
        if answered >= count // 3 and not started.is_set():
            started.set()
            changing.start()

    outcomes = asyncio.run(ask_all(port, clients, bodies, after))
    changing.join()
    wrong = [o for o in outcomes if o.kind == "complete" and o.request in before and before[o.request].text != o.text]
    return Losses(
        what,
        count,
        dict(Counter(outcome.kind for outcome in outcomes)),
        changed[0],
        len(wrong),
        len({outcome.replica for outcome in outcomes} - {""}),
    )


def kill_one(address: str, model: str) -> int:
    """Kill the busiest replica of a model with SIGKILL; returns how many requests it had."""
    busiest = max(replicas(address, model), key=lambda each: each.requests)
    os.kill(busiest.process, signal.SIGKILL)
    return busiest.requests
