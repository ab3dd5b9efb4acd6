"""How often each token of a sequence has been generated, kept up to date token by token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

FIRST_CAPACITY = 64


class TokenCounts:
    """The ids of a prompt and of the tokens generated after it, each once, with the number of times it was generated.

    Adding a token takes constant time, on average.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        known = np.unique(np.asarray(prompt, dtype=np.int64))
        self._prompt_ids = self._size = known.size
        self._ids = np.resize(known, known.size + FIRST_CAPACITY) if known.size else np.zeros(FIRST_CAPACITY, np.int64)
        self._generated = np.zeros(self._ids.size, np.int64)
        self._places = {token_id: place for place, token_id in enumerate(known.tolist())}

    @property
    def ids(self) -> NDArray[np.int64]:
        """The different ids (n,)."""
        return self._ids[: self._size]

    @property
    def generated(self) -> NDArray[np.int64]:
        """How often each of `ids` was generated (n,); 0 for one that only the prompt has."""
        return self._generated[: self._size]

    def add(self, token_id: int) -> None:
        """Count a generated token."""
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = self._size
            if place == self._ids.size:
                self._ids, self._generated = (
                    np.concatenate([each, np.zeros_like(each)]) for each in (self._ids, self._generated)
                )
            self._ids[place] = token_id
            self._generated[place] = 0
            self._size += 1
        self._generated[place] += 1

    @contextmanager
    def assuming(self, drafts: Sequence[int]) -> Iterator[None]:
        """Within the block, count these tokens as if they had been generated."""
        for token_id in drafts:
            self.add(token_id)
        try:
            yield
        finally:
            for token_id in reversed(drafts):
                self._take_back(token_id)

    def _take_back(self, token_id: int) -> None:
        """Undo the latest `add`, which was of this id."""
        place = self._places[token_id]
        self._generated[place] -= 1
        if place >= self._prompt_ids and not self._generated[place]:  # it was new, so it is the last one
            del self._places[token_id]
            self._size -= 1
