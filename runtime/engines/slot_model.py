"""What an engine offers to a scheduler: many sequences, each in a slot of its caches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray


class Row(NamedTuple):
    """A row of a step; several rows of one slot are consecutive tokens of it."""

    slot: int
    token_id: int


@dataclass(frozen=True)
class Snapshot:
    """What a slot held: its tokens, and its columns in the host's memory."""

    tokens: tuple[int, ...]
    written: int
    columns: list[NDArray[Any]]

    @property
    def nbytes(self) -> int:
        """Memory of the columns."""
        return sum(part.nbytes for part in self.columns)


class SlotModel(Protocol):
    """A model with slots, each of which holds the tokens of one sequence."""

    @property
    def slots(self) -> int:
        """Number of sequences."""

    @property
    def step_rows(self) -> Sequence[int]:
        """Sizes of steps, ascending; n rows run as the smallest that holds them."""

    @property
    def chunks(self) -> Sequence[int]:
        """Most tokens of each prefill call, descending; n tokens run as the smallest that holds them."""

    @property
    def same_bits_in_any_call(self) -> bool:
        """Whether a token's results do not depend on the call that computes it, only on the tokens before it."""

    def tokens(self, slot: int) -> Sequence[int]:
        """The ids that the slot's caches hold, in order."""

    def room(self, slot: int) -> int | None:
        """How many more tokens fit; None without a limit."""

    def least_rewind(self, slot: int) -> int:
        """The fewest tokens to which the slot can be rewound; 0, which empties it, is always possible besides."""

    def prefill(self, slot: int, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append at most chunks[0] ids in one call; returns logits (vocab,) after the last."""

    def step(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """Append each row's id to its slot in one call; returns logits (n, vocab)."""

    def rewind(self, slot: int, length: int) -> None:
        """Forget all tokens from `length` on."""

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """Let `target` hold the first `length` tokens of `source`, to which `source` could be rewound."""

    def save(self, slot: int) -> Snapshot:
        """A copy of the slot's caches."""

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """Let the slot hold what it held when the snapshot was saved."""


def capacity_of(model: SlotModel) -> int | None:
    """How many tokens an empty slot holds; None without a limit."""
    room = model.room(0)
    return None if room is None else room + len(model.tokens(0))


def step_all(model: SlotModel, rows: Sequence[Row]) -> NDArray[np.float32]:
    """As `SlotModel.step`, for any number of rows of different slots, in as few steps as hold them."""
    most = model.step_rows[-1]
    steps = [model.step(rows[start : start + most]) for start in range(0, len(rows), most)]
    return steps[0] if len(steps) == 1 else np.concatenate(steps)
