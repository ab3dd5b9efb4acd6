"""Ways to feed an engine."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.engines.engine import Engine
from runtime.engines.slot_model import Row


def emptied(engine: Engine) -> Engine:
    """The engine, whose slots hold nothing."""
    for slot in range(engine.slots):
        engine.rewind(slot, 0)
    return engine


def stepwise(engine: Engine, slot: int, ids: Sequence[int], size: int | None = None) -> NDArray[np.float32]:
    """Logits (n, vocab) after each of the ids, in a step of its own, which has room for `size` rows."""
    return np.concatenate([engine.step([Row(slot, token_id)], size=size) for token_id in ids])
