"""Tokens per second of several sequences that advance together, each a row of the same steps.

Every sequence has the same random ids: speed does not depend on them. A step counts from the ids that it is given to
the likeliest id of each row.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.columns import in_columns
from runtime.engines.slot_model import Row, SlotModel, Snapshot, capacity_of, step_all

SEED = 0
HEADING = ("context", "sequences", "tok/s in all", "ms a step", "times one sequence")


class Sequences(Protocol):
    """Several sequences of one engine, which are filled and then advance by a token at a time."""

    @property
    def most(self) -> int:
        """How many sequences there are."""

    def capacity(self) -> int | None:
        """How many tokens a sequence holds; None without a limit."""

    def fill(self, ids: Sequence[int]) -> None:
        """Take these ids as the context of every sequence."""

    def restart(self, count: int) -> None:
        """Let the first `count` sequences hold the context and nothing else."""

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one id to each of the first len(ids) sequences; returns logits (len(ids), vocab)."""


class SlotSequences:
    """The slots of an engine of ours."""

    def __init__(self, engine: SlotModel) -> None:
        self._engine = engine
        self._context: Snapshot | None = None

    @property
    def most(self) -> int:
        """How many slots there are."""
        return self._engine.slots

    def capacity(self) -> int | None:
        """How many tokens a slot holds; None without a limit."""
        return capacity_of(self._engine)

    def fill(self, ids: Sequence[int]) -> None:
        """Take these ids as the context of every sequence; they are computed once."""
        self._engine.rewind(0, 0)
        for start in range(0, len(ids), self._engine.chunks[0]):
            self._engine.prefill(0, ids[start : start + self._engine.chunks[0]])
        self._context = self._engine.save(0)

    def restart(self, count: int) -> None:
        """Let the first `count` slots hold the context; a snapshot also brings back what a ring has overwritten."""
        assert self._context is not None, "fill comes first"
        for slot in range(count):
            self._engine.restore(slot, self._context)

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one id to each of the first slots, in as few steps as hold them; returns logits (len(ids), vocab)."""
        return step_all(self._engine, [Row(slot, token_id) for slot, token_id in enumerate(ids)])


@dataclass(frozen=True)
class SequencesWorkload:
    """How many sequences to run, behind how many tokens of context, for how many steps; each is repeated."""

    counts: tuple[int, ...]
    contexts: tuple[int, ...]
    steps: int
    repeats: int

    @property
    def columns(self) -> int:
        """Columns of a cache that holds a sequence, in whole blocks of 64, which every engine reads at full speed."""
        return -(-(max(self.contexts) + 1 + self.steps) // 64) * 64


@dataclass(frozen=True)
class SequencesSpeed:
    """The median of the mean time of a step, and the tokens per second of all sequences together."""

    sequences: int
    context: int
    step_s: float
    tok_s: float


@dataclass(frozen=True)
class SequencesReport:
    """What was measured and, in `skipped`, why the rest was not."""

    speeds: tuple[SequencesSpeed, ...]
    skipped: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, ...]]:
        """A row under `HEADING` for each number of sequences at each context."""
        alone = {speed.context: speed.tok_s for speed in self.speeds if speed.sequences == 1}
        return [
            (
                str(speed.context),
                str(speed.sequences),
                f"{speed.tok_s:,.1f}",
                f"{speed.step_s * 1e3:,.2f}",
                f"{speed.tok_s / alone[speed.context]:.2f}" if speed.context in alone else "-",
            )
            for speed in self.speeds
        ]

    def table(self) -> str:
        """The rows in columns, and what was skipped."""
        return "\n".join([*in_columns([HEADING, *self.rows()], figures=True), *self.skipped])


def measure_sequences(
    engine: Sequences,
    vocab_size: int,
    workload: SequencesWorkload,
    clock: Callable[[], float] = time.perf_counter,
) -> SequencesReport:
    """Time each number of sequences in turn, in every repeat; the first step after a restart is not counted."""
    capacity = engine.capacity()
    counts = [n for n in workload.counts if n <= engine.most]
    contexts = [n for n in workload.contexts if capacity is None or n + 1 + workload.steps <= capacity]
    ids = np.random.default_rng(SEED).integers(vocab_size, size=max(workload.contexts)).tolist()
    speeds = []
    for context in contexts:
        engine.fill(ids[:context])
        samples: dict[int, list[float]] = {n: [] for n in counts}
        for _ in range(workload.repeats):
            for n, taken in samples.items():
                taken.append(_step_seconds(engine, n, workload.steps, clock))
        speeds += [SequencesSpeed(n, context, median(s), n / median(s)) for n, s in samples.items()]
    skipped = [f"skipped: {n} sequences, more than the {engine.most} slots" for n in workload.counts if n not in counts]
    skipped += [
        f"skipped: {workload.steps} steps from a context of {n}, more than the {capacity} tokens that a slot holds"
        for n in workload.contexts
        if n not in contexts
    ]
    return SequencesReport(tuple(speeds), tuple(skipped))


def _step_seconds(engine: Sequences, count: int, steps: int, clock: Callable[[], float]) -> float:
    """Mean seconds of a greedy step."""
    engine.restart(count)
    chosen = engine.decode([0] * count).argmax(-1)
    start = clock()
    for _ in range(steps):
        chosen = engine.decode(chosen.tolist()).argmax(-1)
    return (clock() - start) / steps
