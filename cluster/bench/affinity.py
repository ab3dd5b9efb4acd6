"""How often a turn of a conversation comes to the replica that holds the turns before it."""

import asyncio
from dataclasses import dataclass
from itertools import pairwise

from cluster.bench.client import ask, chat_body


@dataclass(frozen=True)
class AffinityResult:
    """Later turns of conversations, those of them that came to the replica of the turn before, and tokens reused."""

    turns: int
    hits: int
    cached_tokens: int
    replicas: int

    @property
    def rate(self) -> float:
        """Share of the later turns."""
        return self.hits / self.turns


async def _conversation(port: int, model: str, number: int, turns: int, tokens: int) -> list[tuple[str, int]]:
    """The replica and the cached tokens of each turn."""
    messages = [
        {"role": "system", "content": "You are a helpful assistant who answers in short sentences."},
        {"role": "user", "content": f"Question {number}: what is the story of number {number}?"},
    ]
    found = []
    for turn in range(turns):
        outcome = await ask(port, chat_body(model, messages, tokens))
        assert outcome.kind == "complete", outcome
        found.append((outcome.replica, outcome.cached_tokens))
        answer = {"role": "assistant", "content": outcome.text}
        messages = [*messages, answer, {"role": "user", "content": f"And then, in turn {turn}?"}]
    return found


def measure_affinity(port: int, model: str, *, clients: int, turns: int, tokens: int) -> AffinityResult:
    """Let as many conversations as there are clients go on at the same time."""

    async def all_conversations() -> list[list[tuple[str, int]]]:
        return await asyncio.gather(*(_conversation(port, model, each, turns, tokens) for each in range(clients)))

    conversations = asyncio.run(all_conversations())
    pairs = [pair for each in conversations for pair in pairwise(each)]
    return AffinityResult(
        len(pairs),
        sum(before[0] == after[0] for before, after in pairs),
        sum(after[1] for _, after in pairs),
        len({replica for each in conversations for replica, _ in each}),
    )
