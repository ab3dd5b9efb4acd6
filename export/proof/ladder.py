"""The correctness ladder's common ground: which token sequences are fed in which chunks, and how two sets of logits are compared.

A trace is what one implementation answered: for each case, the calls and their logits. The build stage replays it on the compiled artifact.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import ModelConfig, ParityRow, Shape

TRACE_FILE, ROWS_FILE = "parity-trace.npz", "parity-rows.json"
SEED = 20260101
NOT_A_NUMBER = 1e300  # what a NaN counts as: beyond every bound, and a number in JSON
MAX_CASE = 512  # tokens: longer windows are crossed by overrides on small models, not here
Logits = NDArray[np.float32]
Step = Callable[[int, NDArray[np.int64], NDArray[np.int64]], Logits]


@dataclass(frozen=True)
class Case:
    """One sequence for each batch row, (B, n), fed in the chunks of `schedule`, the first padded on the left where they exceed n."""

    label: str
    ids: NDArray[np.int64]
    schedule: tuple[int, ...]

    @property
    def padding(self) -> int:
        """Columns in front of the first token."""
        return sum(self.schedule) - self.ids.shape[1]

    def calls(self) -> list[tuple[int, NDArray[np.int64], NDArray[np.int64]]]:
        """(tokens, ids (B, T), first position (B,)) of each call, padding included."""
        padded = np.pad(self.ids, ((0, 0), (self.padding, 0)))
        result = []
        start = 0
        for tokens in self.schedule:
            first = np.full(len(padded), start - self.padding, np.int64)
            result.append((tokens, np.ascontiguousarray(padded[:, start : start + tokens]), first))
            start += tokens
        return result

    def run(self, step: Step) -> list[Logits]:
        """Logits (B, vocab) after each call."""
        return [step(*call) for call in self.calls()]

    def ends(self) -> list[int]:
        """Index of the last token of each call; negative for a call of padding alone."""
        return [int(end) - 1 - self.padding for end in np.cumsum(self.schedule)]


def lengths(model: ModelConfig, shape: Shape) -> list[int]:
    """Lengths around what can go wrong: the window (1, W-1, W, W+1, 2W+3) where it is short enough, else around the chunk sizes alike."""
    windows = sorted({w for w in model.sliding_window if w is not None and 2 * w + 3 <= MAX_CASE})
    around = [n for w in windows for n in (w - 1, w, w + 1, 2 * w + 3)] or [
        n for c in shape.prefill_chunks for n in (c - 1, c, c + 1, 2 * c + 3)
    ]
    limit = min(MAX_CASE, shape.cache_len if None in model.sliding_window else MAX_CASE)
    return sorted({n for n in (1, *around) if 1 <= n <= limit})


def make_cases(model: ModelConfig, shape: Shape) -> list[Case]:
    """Seeded random ids at every length in every chunk size, and another way besides: token by token, or behind a chunk of padding alone."""
    generator = np.random.default_rng(SEED)
    cases = []
    for n in lengths(model, shape):
        ids = generator.integers(0, model.vocab_size, (shape.batch, n))
        for chunk in shape.prefill_chunks:
            cases.append(Case(f"{n} tokens in chunks of {chunk}", ids, (chunk,) * -(-n // chunk)))
        if not model.generates:
            smallest = shape.prefill_chunks[-1]
            cases.append(Case(f"{n} tokens behind a chunk of padding", ids, (smallest,) * (-(-n // smallest) + 1)))
            continue
        if n == max(lengths(model, shape)):
            smallest = shape.prefill_chunks[-1]
            head = n // 2 // smallest  # half as prefill, the rest one by one
            cases.append(Case(f"{n} tokens, half one by one", ids, (smallest,) * head + (1,) * (n - head * smallest)))
        if n <= 2 * shape.prefill_chunks[-1] or any(w is not None and n > w for w in model.sliding_window):
            cases.append(Case(f"{n} tokens one by one", ids, (1,) * n))
    return cases


def compare(rung: str, compared: str, pairs: list[tuple[Logits, Logits]], bound: float) -> ParityRow:
    """One row of the table: `pairs` of (found, expected) logits, each (B, vocab); the bound is on max |difference| / max |expected|."""
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
    """(found, expected) of every call that ends in a real token."""
    return [
        (mine, theirs)
        for case, one, other in zip(cases, found, expected, strict=True)
        for end, mine, theirs in zip(case.ends(), one, other, strict=True)
        if end >= 0
    ]


def ways_agree(cases: list[Case], answers: list[list[Logits]]) -> list[tuple[Logits, Logits]]:
    """Final logits of the cases that feed the same ids in other chunks, each against the first way."""
    first: dict[bytes, Logits] = {}
    pairs = []
    for case, logits in zip(cases, answers, strict=True):
        key = case.ids.tobytes()
        if key in first:
            pairs.append((logits[-1], first[key]))
        else:
            first[key] = logits[-1]
    return pairs


def save_trace(path: Path, cases: list[Case], logits: list[list[Logits]]) -> None:
    """Write what one implementation answered."""
    arrays = {
        f"{i}.{kind}": array
        for i, case in enumerate(cases)
        for kind, array in (("ids", case.ids), ("schedule", np.array(case.schedule)))
    }
    arrays |= {f"{i}.logits": np.stack(answers) for i, answers in enumerate(logits)}
    np.savez(path, labels=np.array([case.label for case in cases]), **arrays)  # type: ignore[arg-type]


def load_trace(path: Path) -> tuple[list[Case], list[list[Logits]]]:
    """Read a trace."""
    with np.load(path, allow_pickle=False) as data:
        cases = [
            Case(str(label), data[f"{i}.ids"], tuple(int(t) for t in data[f"{i}.schedule"]))
            for i, label in enumerate(data["labels"])
        ]
        return cases, [list(data[f"{i}.logits"]) for i in range(len(cases))]
