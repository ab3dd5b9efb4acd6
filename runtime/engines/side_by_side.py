"""Several texts in the slots of an engine that advance together, for what measures and compares models."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.manifest import Manifest
from runtime.decoding.options import SamplingOptions
from runtime.decoding.sampler import Sampler
from runtime.engines.engine import Engine
from runtime.engines.slot_model import Row, step_all


class SideBySide:
    """The first `batch` slots of an engine, which are emptied, as a model of so many texts."""

    def __init__(self, engine: Engine, batch: int) -> None:
        assert batch <= engine.slots
        self.engine, self.batch = engine, batch
        self.reset()

    @property
    def manifest(self) -> Manifest:
        """The artifact's manifest."""
        return self.engine.manifest

    def head_outputs(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """As `Engine.head_outputs`."""
        return self.engine.head_outputs(ids)

    def room(self) -> int | None:
        """How many more ids fit every text; None without a limit."""
        rooms = [self.engine.room(slot) for slot in range(self.batch)]
        return min((room for room in rooms if room is not None), default=None)

    def reset(self) -> None:
        """Forget every id."""
        for slot in range(self.batch):
            self.engine.rewind(slot, 0)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """Append ids to each text; returns logits (batch, vocab) after the last of each. Raises as `Engine.feed`."""
        if all(len(prompt) == 1 for prompt in prompts):
            return self.decode([prompt[0] for prompt in prompts])
        return np.stack([self.engine.feed(slot, prompt) for slot, prompt in enumerate(prompts)])

    def decode(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Append one id to each text, in as few steps as hold them; returns logits (batch, vocab)."""
        return step_all(self.engine, [Row(slot, token_id) for slot, token_id in enumerate(ids)])

    def can_draw(self, options: SamplingOptions) -> bool:
        """Whether the machine draws ids by itself, which it does for one text."""
        return self.batch == 1 and self.engine.can_draw(options)

    def draw(self, token_id: int, sampler: Sampler, steps: int) -> Iterator[int]:
        """As `Engine.draw`."""
        return self.engine.draw(0, token_id, sampler, steps)
