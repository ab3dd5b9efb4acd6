"""Snapshots of slots in the memory of the host, within a budget of bytes; the least recently used ones go first."""

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.engines.slot_model import SlotModel, Snapshot


@dataclass
class SavedPrefix:
    """A snapshot, and how it can be used."""

    snapshot: Snapshot
    least_rewind: int  # fewest tokens to which a slot can be rewound that holds it
    whole_chunks: int  # its first tokens that were computed by whole chunks of a prompt


class SnapshotStore:
    """Keeps snapshots of at most `budget` bytes in all."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.saved: list[SavedPrefix] = []  # the least recently used first
        self._too_long: int | None = None  # tokens of a snapshot that was larger than the whole budget

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots."""
        return sum(prefix.snapshot.nbytes for prefix in self.saved)

    def save(self, model: SlotModel, slot: int, whole_chunks: int) -> bool:
        """Keep what a slot holds; returns whether a snapshot was made.

        None is made of tokens that are kept already, nor where it would be larger than the budget.
        """
        tokens = list(model.tokens(slot))
        if self.budget == 0 or (self._too_long is not None and len(tokens) >= self._too_long):
            return False
        if any(_serves(prefix, tokens) for prefix in self.saved):
            return False
        snapshot = model.save(slot)
        if snapshot.nbytes > self.budget:
            self._too_long = len(tokens)
            return False
        new = SavedPrefix(snapshot, model.least_rewind(slot), whole_chunks)
        self.saved = [prefix for prefix in self.saved if not _serves(new, prefix.snapshot.tokens)]
        self.saved.append(new)
        while self.nbytes > self.budget:
            self.saved.pop(0)
        return True

    def touch(self, prefix: SavedPrefix) -> None:
        """Note that a snapshot was used, if it is still kept."""
        self.saved.sort(key=lambda other: other is prefix)


def _serves(prefix: SavedPrefix, tokens: Sequence[int]) -> bool:
    """Whether a slot could hold exactly these tokens after the snapshot is restored."""
    held = prefix.snapshot.tokens
    exactly = len(held) == len(tokens) or prefix.least_rewind <= len(tokens) < len(held)
    return exactly and list(held[: len(tokens)]) == list(tokens)
