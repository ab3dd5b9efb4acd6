"""The time to the first token of a conversation's next turn, beside that of the same prompt in an empty slot.

A scheduler serves both, as it would serve users: it finds the conversation in its slot and feeds what is new. Ids are
random, and slots are emptied before what is to be computed anew.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.benchmarks.one_request import events_of
from runtime.benchmarks.spread import Spread
from runtime.columns import in_columns
from runtime.engines.slot_model import SlotModel, capacity_of
from runtime.scheduling.requests import Generated, Request, Started
from runtime.scheduling.scheduler import Scheduler
from runtime.scheduling.settings import SchedulerSettings

SEED = 0


@dataclass(frozen=True)
class SecondTurnWorkload:
    """Tokens of the conversation, numbers of new tokens, and how often each is measured."""

    conversation: int
    new_tokens: tuple[int, ...]
    repeats: int


@dataclass(frozen=True)
class SecondTurn:
    """Seconds to the first token with `new_tokens` behind the conversation, and with the whole prompt anew.

    `share` is the ratio of the two in each repeat.
    """

    new_tokens: int
    continued_s: Spread
    cold_s: Spread
    share: Spread


@dataclass(frozen=True)
class SecondTurnReport:
    """What was measured and, in `skipped`, why the rest was not. `wrapped`: some ring had overwritten its start."""

    conversation: int
    wrapped: bool
    turns: tuple[SecondTurn, ...]
    skipped: tuple[str, ...] = ()

    def table(self) -> str:
        """A row for each number of new tokens."""
        rows = [
            (
                str(turn.new_tokens),
                f"{1e3 * turn.continued_s.median:,.1f}",
                f"{1e3 * turn.cold_s.median:,.1f}",
                f"{turn.share:.3f}",
                f"{turn.new_tokens / (turn.new_tokens + self.conversation):.3f}",
            )
            for turn in self.turns
        ]
        headers = ("new tokens", "TTFT ms", "cold TTFT ms", "share of the time (quartiles)", "share of the tokens")
        title = f"behind a conversation of {self.conversation} tokens{', in rings that have wrapped' * self.wrapped}"
        return "\n".join([title, *in_columns([headers, *rows], figures=True), *self.skipped])


def measure_second_turn(
    model: SlotModel, vocab_size: int, workload: SecondTurnWorkload, clock: Callable[[], float]
) -> SecondTurnReport:
    """Time each number of new tokens in turn, in every repeat.

    One round before them does not count: in it the scheduler learns how long its calls take.
    """
    capacity, conversation = capacity_of(model), workload.conversation
    fitting = [n for n in workload.new_tokens if capacity is None or conversation + n <= capacity]
    scheduler = Scheduler(model, SchedulerSettings(reuse="full"), clock)
    rng = np.random.default_rng(SEED)
    samples: dict[int, list[tuple[float, float]]] = {n: [] for n in fitting}
    wrapped = False
    for repeat in range(workload.repeats + 1):
        for n, taken in samples.items():
            ids = rng.integers(vocab_size, size=conversation + n).tolist()
            _empty(model)
            _first_token_seconds(scheduler, ids[:conversation], 0, clock)
            wrapped |= any(model.least_rewind(slot) for slot in range(model.slots))
            continued = _first_token_seconds(scheduler, ids, conversation, clock)
            _empty(model)
            cold = _first_token_seconds(scheduler, ids, 0, clock)
            if repeat:
                taken.append((continued, cold))
    turns = [_second_turn(n, taken) for n, taken in samples.items()]
    skipped = [
        f"skipped: {n} new tokens behind {conversation}, more than the {capacity} tokens that a slot holds"
        for n in workload.new_tokens
        if n not in fitting
    ]
    return SecondTurnReport(conversation, wrapped, tuple(turns), tuple(skipped))


def _empty(model: SlotModel) -> None:
    for slot in range(model.slots):
        model.rewind(slot, 0)


def _second_turn(new_tokens: int, pairs: Sequence[tuple[float, float]]) -> SecondTurn:
    continued, cold = zip(*pairs, strict=True)
    return SecondTurn(new_tokens, Spread.of(continued), Spread.of(cold), Spread.of_ratios(continued, cold))


def _first_token_seconds(scheduler: Scheduler, prompt: Sequence[int], reused: int, clock: Callable[[], float]) -> float:
    """Seconds until the first token of a prompt, of which a slot holds the first `reused` ids."""
    start = clock()
    seconds = 0.0
    for event in events_of(scheduler, Request(start, prompt, max_tokens=1)):
        if isinstance(event, Started):
            assert event.cached_tokens == reused, f"{event.cached_tokens} tokens were reused, not {reused}"
        if isinstance(event, Generated):
            seconds = clock() - start
    return seconds
