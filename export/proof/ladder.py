"""Shared parts of the correctness ladder: token sequences and their chunks, and the comparison of two sets of logits.

A trace holds the answers of one implementation: for each case, the calls and their logits. The build stage replays it
on the compiled artifact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import ModelConfig, ParityRow, Shape

TRACE_FILE, ROWS_FILE = "parity-trace.npz", "parity-rows.json"
SEED = 20260101
NOT_A_NUMBER = 1e300  # stands for a NaN: beyond every bound, and a valid number in JSON
MOST_STEPS = 48  # of the cases with several rows
MAX_CASE = 512  # tokens; longer windows are crossed with overrides on small models, not here
Logits = NDArray[np.float32]
Step = Callable[[NDArray[np.int64], NDArray[np.int64]], Logits]


@dataclass(frozen=True)
class Case:
    """Sequences fed side by side in calls of `schedule` tokens each: one, or as many as a step has rows.

    All end with the last call. What a schedule has beyond a sequence's tokens is padding before them, so that rows of
    different lengths are at different positions in every call; a row without a slot has only padding.
    """

    label: str
    sequences: tuple[NDArray[np.int64], ...]
    schedule: tuple[int, ...]

    @property
    def padding(self) -> NDArray[np.int64]:
        """Padding before each sequence (B,)."""
        return sum(self.schedule) - np.array([len(ids) for ids in self.sequences])

    def calls(self) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Ids (B, T) and first positions (B,) of each call, padding included."""
        padded = np.stack([np.pad(ids, (count, 0)) for ids, count in zip(self.sequences, self.padding, strict=True)])
        ends = np.cumsum(self.schedule)
        return [
            (np.ascontiguousarray(padded[:, end - tokens : end]), end - tokens - self.padding)
            for end, tokens in zip(ends, self.schedule, strict=True)
        ]

    def run(self, step: Step) -> list[Logits]:
        """Logits (B, vocab) after each call."""
        return [step(*call) for call in self.calls()]

    def ends(self) -> list[NDArray[np.int64]]:
        """Index of each row's last token (B,) in each call; negative where a call has only padding."""
        return [end - 1 - self.padding for end in np.cumsum(self.schedule)]


def lengths(model: ModelConfig, shape: Shape) -> list[int]:
    """Lengths around the points where something can go wrong.

    They are 1, W-1, W, W+1 and 2W+3 for every window W that is short enough, or, if there is none, the same lengths for
    every chunk size.
    """
    windows = sorted({w for w in model.sliding_window if w is not None and 2 * w + 3 <= MAX_CASE})
    around = [n for w in windows for n in (w - 1, w, w + 1, 2 * w + 3)] or [
        n for c in shape.prefill_chunks for n in (c - 1, c, c + 1, 2 * c + 3)
    ]
    limit = min(MAX_CASE, shape.cache_len if None in model.sliding_window else MAX_CASE)
    return sorted({n for n in (1, *around) if 1 <= n <= limit})


def make_cases(model: ModelConfig, shape: Shape) -> list[Case]:
    """Seeded random ids of every length in every chunk size, and fed in other ways.

    These are token by token or, if the model does not generate, after a chunk that holds only padding. Steps of several
    rows get sequences of different lengths.
    """
    generator = np.random.default_rng(SEED)
    cases = []
    all_lengths = lengths(model, shape)
    for n in all_lengths:
        ids = (generator.integers(0, model.vocab_size, n),)
        for chunk in shape.prefill_chunks:
            cases.append(Case(f"{n} tokens in chunks of {chunk}", ids, (chunk,) * -(-n // chunk)))
        if not model.generates:
            smallest = shape.prefill_chunks[-1]
            cases.append(Case(f"{n} tokens behind a chunk of padding", ids, (smallest,) * (-(-n // smallest) + 1)))
            continue
        if n == max(all_lengths):
            smallest = shape.prefill_chunks[-1]
            head = n // 2 // smallest  # half as prefill, the rest one by one
            cases.append(Case(f"{n} tokens, half one by one", ids, (smallest,) * head + (1,) * (n - head * smallest)))
        if n <= 2 * shape.prefill_chunks[-1] or any(w is not None and n > w for w in model.sliding_window):
            cases.append(Case(f"{n} tokens one by one", ids, (1,) * n))
    if model.generates:
        longest = min(MOST_STEPS, max(all_lengths))
        for rows in (rows for rows in shape.step_rows if rows > 1):
            counts = [max(longest - i * max(longest // rows, 1), 1) if i < shape.slots else 0 for i in range(rows)]
            sequences = tuple(generator.integers(0, model.vocab_size, count) for count in counts)
            cases.append(Case(f"{rows} rows of at most {longest} tokens", sequences, (1,) * longest))
    return cases


def compare(rung: str, compared: str, pairs: list[tuple[Logits, Logits]], bound: float) -> ParityRow:
    """One row of the table, from `pairs` of (found, expected) logits, each (B, vocab).

    The bound applies to max |difference| / max |expected|.
    """
    worst_abs = worst_rel = 0.0
    agreed = total = 0
    for found, expected in pairs:
        difference = float(np.nan_to_num(np.abs(found.astype(np.float64) - expected).max(), nan=NOT_A_NUMBER))
        worst_abs = max(worst_abs, difference)
        worst_rel = max(worst_rel, difference / float(np.abs(expected).max()))
        agreed += int((found.argmax(-1) == expected.argmax(-1)).sum())
        total += len(found)
    passed = worst_rel <= bound
    return ParityRow(
        rung=rung,
        compared=compared,
        max_abs=worst_abs,
        max_rel=worst_rel,
        top1_agreement=agreed / total,
        bound=bound,
        passed=passed,
    )


def pairs_with(
    cases: list[Case], found: list[list[Logits]], expected: list[list[Logits]]
) -> list[tuple[Logits, Logits]]:
    """The (found, expected) pairs of every call, of the rows that it ends with a real token."""
    return [
        (mine[end >= 0], theirs[end >= 0])
        for case, one, other in zip(cases, found, expected, strict=True)
        for end, mine, theirs in zip(case.ends(), one, other, strict=True)
        if (end >= 0).any()
    ]


def ways_agree(cases: list[Case], answers: list[list[Logits]]) -> list[tuple[Logits, Logits]]:
    """Final logits of the cases that feed the same ids in other chunks, each paired with those of the first way."""
    first: dict[bytes, Logits] = {}
    pairs = []
    for case, logits in zip(cases, answers, strict=True):
        key = b"".join(ids.tobytes() for ids in case.sequences)
        if key in first:
            pairs.append((logits[-1], first[key]))
        else:
            first[key] = logits[-1]
    return pairs


def save_trace(path: Path, cases: list[Case], logits: list[list[Logits]]) -> None:
    """Write the answers of one implementation."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for i, case in enumerate(cases):
        arrays[f"{i}.schedule"] = np.array(case.schedule)
        arrays |= {f"{i}.ids.{row}": ids for row, ids in enumerate(case.sequences)}
    arrays |= {f"{i}.logits": np.stack(answers) for i, answers in enumerate(logits)}
    np.savez(path, labels=np.array([case.label for case in cases]), **arrays)  # type: ignore[arg-type]


def load_trace(path: Path) -> tuple[list[Case], list[list[Logits]]]:
    """Read a trace."""
    with np.load(path, allow_pickle=False) as data:
        cases = []
        for i, label in enumerate(data["labels"]):
            rows = sum(name.startswith(f"{i}.ids.") for name in data.files)
            sequences = tuple(data[f"{i}.ids.{row}"] for row in range(rows))
            cases.append(Case(str(label), sequences, tuple(int(t) for t in data[f"{i}.schedule"])))
        return cases, [list(data[f"{i}.logits"]) for i in range(len(cases))]
