"""Drafts from a sequence's own tokens: what followed the last time that it ended like this.

The idea is prompt lookup decoding (Apoorv Saxena, 2023).
"""

from collections.abc import Sequence
from typing import NamedTuple

LONGEST_MATCH = 3
SHORTEST_MATCH = 2


class Proposal(NamedTuple):
    """Tokens that may follow, and the length of the match that suggests them."""

    drafts: list[int]
    matched: int


NO_PROPOSAL = Proposal([], 0)


class PromptLookup:
    """An index of a sequence that only grows; each token is added once, in constant time."""

    def __init__(self) -> None:
        self._tokens: list[int] = []
        self._ends: dict[tuple[int, ...], int] = {}  # the place after the last occurrence that a token follows

    def extend(self, tokens: Sequence[int]) -> None:
        """Add tokens to the end of the sequence."""
        for token in tokens:
            end = len(self._tokens)
            for length in range(SHORTEST_MATCH, min(LONGEST_MATCH, end) + 1):
                self._ends[tuple(self._tokens[end - length :])] = end
            self._tokens.append(token)

    def propose(self, most: int) -> Proposal:
        """At most `most` tokens; none if the sequence never ended like this before.

        Where they run into the end of the sequence, they go on with themselves, so that a text that repeats itself is
        continued.
        """
        known = self._tokens
        for length in range(min(LONGEST_MATCH, len(known)), SHORTEST_MATCH - 1, -1):
            place = self._ends.get(tuple(known[-length:]))
            if place is not None:
                drafts: list[int] = []
                for source in range(place, place + most):
                    drafts.append(known[source] if source < len(known) else drafts[source - len(known)])
                return Proposal(drafts, length)
        return NO_PROPOSAL
