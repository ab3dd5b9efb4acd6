"""An engine of which every result must have the bits that the same tokens gave before, whatever else was there."""

import numpy as np


class CheckedBits:
    """A `SlotModel` over an engine; `seen` holds the logits after each prefix that was ever fed."""

    def __init__(self, engine, seen=None):
        self.engine = engine
        self.seen = {} if seen is None else seen
        self.repeated = 0  # results that were compared
        for slot in range(engine.slots):
            engine.rewind(slot, 0)

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def prefill(self, slot, ids):
        return self._checked(self.engine.prefill(slot, ids), tuple(self.engine.tokens(slot)))

    def step(self, rows):
        before = {row.slot: list(self.engine.tokens(row.slot)) for row in rows}
        logits = self.engine.step(rows)
        for row, own in zip(rows, logits, strict=True):
            before[row.slot].append(row.token_id)
            self._checked(own, tuple(before[row.slot]))
        return logits

    def _checked(self, logits, prefix):
        expected = self.seen.setdefault(prefix, logits)
        self.repeated += expected is not logits
        assert np.array_equal(logits, expected), f"other bits after {len(prefix)} tokens"
        return logits
