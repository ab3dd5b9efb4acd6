"""Reads passages with several models in step, and gathers each one's figures against the first."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from build.tools.quality.figures import Distribution, Quality, TokenFigures
from build.tools.quality.texts import Passages


class Reader(Protocol):
    """The interface of a model that reads a batch of texts; `SideBySide` and `LlamaEngine` have it."""

    @property
    def batch(self) -> int:
        """Texts that are read side by side."""

    def reset(self) -> None:
        """Forget every id."""

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append ids to each text; returns logits (batch, vocab) after the last."""


@dataclass(frozen=True)
class Contestant:
    """A variant that takes part: what reads the text, and the size of its weights."""

    reader: Reader
    weight_bytes: int


def measure(
    contestants: Mapping[str, Contestant], text: str, passages: Passages, advance: Callable[[int], None]
) -> list[Quality]:
    """The figures of all contestants on the passages of `text`; the first one is the baseline.

    All advance in step, so that no distribution is kept. `advance` is told the number of tokens after each step.
    """
    figures = {label: TokenFigures() for label in contestants}
    batch = next(iter(contestants.values())).reader.batch
    for group, count in _groups(passages.ids, batch):
        for contestant in contestants.values():
            contestant.reader.reset()
        for fed, targets in _steps(group, passages.unscored):
            baseline: Distribution | None = None
            for label, contestant in contestants.items():
                found = Distribution.of(contestant.reader.prefill(fed.tolist())[:count])
                baseline = found if baseline is None else baseline
                figures[label].add(found, baseline, targets[:count])
            advance(count)
    return [
        figures[label].quality(text, label, passages.scored_bytes, contestant.weight_bytes)
        for label, contestant in contestants.items()
    ]


def _groups(ids: NDArray[np.int64], batch: int) -> Iterator[tuple[NDArray[np.int64], int]]:
    """Passages (batch, length) that are read side by side, and how many count.

    The last group is filled up with its last passage.
    """
    for start in range(0, len(ids), batch):
        group = ids[start : start + batch]
        filling = np.repeat(group[-1:], batch - len(group), axis=0)
        yield np.concatenate([group, filling]), len(group)


def _steps(ids: NDArray[np.int64], unscored: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """What is fed at each step (batch, n), and the ids that come after it (batch,).

    The first step feeds all context that is not scored at once.
    """
    start = 0
    for end in range(unscored + 1, ids.shape[1]):
        yield ids[:, start:end], ids[:, end]
        start = end
