"""What is measured of a server: throughput and latencies at several numbers of clients, and what a long prompt does.

All prompts are random ids, since speed does not depend on them, and no two are alike, so that none is reused.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from build.bench.served_process import Served
from build.bench.streaming_client import Stream, completion_body, stream

SEED = 0
CO_TENANT_TOKENS = 512


@dataclass(frozen=True)
class LoadWorkload:
    """How many clients, and how many tokens each prompt and each answer has; `requests` of each client follow."""

    clients: tuple[int, ...]
    prompt: int
    tokens: int
    requests: int
    vocab_size: int
    longest_prompt: int

    def prompts(self) -> Callable[[int], list[int]]:
        """What makes the next prompt of a length."""
        random = np.random.default_rng(SEED)
        return lambda length: random.integers(self.vocab_size, size=length).tolist()


@dataclass(frozen=True)
class LevelSpeed:
    """One round with so many clients.

    tok_s: tokens per second in all, from the first request to the last token.
    decode_tok_s: the same while every client was being answered, which no prompt and no end disturbs.
    """

    clients: int
    tok_s: float
    decode_tok_s: float
    first_byte_s: tuple[float, ...]
    ttft_s: tuple[float, ...]
    gaps_s: tuple[float, ...]


@dataclass(frozen=True)
class CoTenant:
    """The gaps of one stream, in seconds: usually, and the largest while another client's long prompt was computed."""

    usual_s: float
    worst_s: float
    prompt: int


async def measure_level(
    served: Served, clients: int, workload: LoadWorkload, make: Callable[[int], list[int]]
) -> LevelSpeed:
    """Let clients send their requests one after another, all at the same time."""
    bodies = [
        [completion_body(served.model, make(workload.prompt), workload.tokens) for _ in range(workload.requests)]
        for _ in range(clients)
    ]

    async def client(own: Sequence[bytes]) -> list[Stream]:
        return [await stream(served, body, workload.tokens) for body in own]

    waves = await asyncio.gather(*(client(own) for own in bodies))
    streams = list(itertools.chain(*waves))
    took = max(each.tokens[-1] for each in streams) - min(each.sent for each in streams)
    return LevelSpeed(
        clients,
        sum(each.count for each in streams) / took,
        steady_speed([wave[0] for wave in waves]),
        tuple(each.first_byte - each.sent for each in streams),
        tuple(each.ttft for each in streams),
        tuple(gap for each in streams for gap in each.gaps),
    )


def steady_speed(streams: Sequence[Stream]) -> float:
    """Tokens per second between the first token of the last stream and the last token of the first that ends."""
    start = max(each.tokens[0] for each in streams)
    end = min(each.tokens[-1] for each in streams)
    if end <= start:
        return float("nan")
    within = [sum(start < arrived <= end for arrived in each.tokens) * each.tokens_an_event for each in streams]
    return sum(within) / (end - start)


async def measure_co_tenant(served: Served, workload: LoadWorkload, make: Callable[[int], list[int]]) -> CoTenant:
    """Let a long prompt come while another client is being answered."""
    other = asyncio.ensure_future(
        stream(served, completion_body(served.model, make(workload.prompt), CO_TENANT_TOKENS), CO_TENANT_TOKENS)
    )
    await asyncio.sleep(0.7)
    long = await stream(served, completion_body(served.model, make(workload.longest_prompt), 1), 1)
    found = await other
    pairs = list(zip(found.tokens, found.tokens[1:], strict=False))
    before = [after - since for since, after in pairs if after < long.sent]
    during = [after - since for since, after in pairs if after > long.sent and since < long.tokens[0]]
    return CoTenant(float(np.median(before)), max(during), workload.longest_prompt)
