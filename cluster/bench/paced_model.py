"""A model that takes a fixed time for each call and computes nothing, so that what is around it can be measured."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.folder import read_manifest
from runtime.artifact.manifest import Manifest
from runtime.engines.engine import Engine
from runtime.engines.slot_model import Row, Snapshot
from runtime.errors import UserError
from runtime.server.running.served_model import ServedModel
from runtime.text.conversation_encoder import open_conversation_encoder
from runtime.text.tokenizer import open_tokenizer

TEXT = "the quick brown fox jumps over the lazy dog while many bright stars slowly turn above a quiet blue sea"


@dataclass(frozen=True)
class Pace:
    """How many sequences a model holds, and the seconds of each step, whatever its rows, and of each prompt token.

    columns: how many tokens each sequence may have.
    """

    slots: int
    step_seconds: float
    token_seconds: float
    columns: int = 2048


class PacedModel:
    """A `SlotModel` whose next token depends on all tokens before it; it never ends a text by itself."""

    same_bits_in_any_call = True

    def __init__(self, manifest: Manifest, words: Sequence[int], pace: Pace) -> None:
        self.manifest = manifest
        self.slots = pace.slots
        self.step_rows = tuple(range(1, pace.slots + 1))
        self.chunks = (512,)
        self._words = words
        self._pace = pace
        self._held: list[list[int]] = [[] for _ in range(pace.slots)]

    def tokens(self, slot: int) -> Sequence[int]:
        """See `SlotModel`."""
        return self._held[slot]

    def room(self, slot: int) -> int | None:
        """See `SlotModel`."""
        return self._pace.columns - len(self._held[slot])

    def least_rewind(self, _slot: int) -> int:
        """See `SlotModel`."""
        return 0

    def rewind(self, slot: int, length: int) -> None:
        """See `SlotModel`."""
        del self._held[slot][length:]

    def can_draw(self, _options: object) -> bool:
        """Draw nothing itself."""
        return False

    def prefill(self, slot: int, ids: Sequence[int]) -> NDArray[np.float32]:
        """See `SlotModel`."""
        time.sleep(self._pace.token_seconds * len(ids))
        self._held[slot] += ids
        return self._logits(slot)

    def step(self, rows: Sequence[Row]) -> NDArray[np.float32]:
        """See `SlotModel`."""
        time.sleep(self._pace.step_seconds)
        found = []
        for slot, token_id in rows:
            self._held[slot].append(token_id)
            found.append(self._logits(slot))
        return np.stack(found)

    def copy_slot(self, source: int, target: int, length: int) -> None:
        """See `SlotModel`."""
        self._held[target] = self._held[source][:length]

    def save(self, slot: int) -> Snapshot:
        """See `SlotModel`."""
        return Snapshot(tuple(self._held[slot]), len(self._held[slot]), [])

    def restore(self, slot: int, snapshot: Snapshot) -> None:
        """See `SlotModel`."""
        self._held[slot] = list(snapshot.tokens)

    def _logits(self, slot: int) -> NDArray[np.float32]:
        logits = np.zeros(self.manifest.model.vocab_size, np.float32)
        logits[self._words[sum(self._held[slot]) % len(self._words)]] = 100
        return logits


def open_paced(artifact: Path, pace: Pace) -> ServedModel:
    """A paced model with an artifact's tokenizer and format; raises `UserError` for one without a tokenizer."""
    manifest = read_manifest(artifact)
    if manifest.tokenizer is None:
        raise UserError(f"{artifact} has no tokenizer, expected an artifact that can be served")
    tokenizer = open_tokenizer(manifest.tokenizer, artifact)
    encoder = open_conversation_encoder(manifest.tokenizer, artifact, tokenizer)
    words = tokenizer.encode(TEXT)
    model = cast(Engine, PacedModel(manifest, words, pace))  # a server uses of it what a `SlotModel` has
    return ServedModel(model, tokenizer, encoder, "", pace.columns)
