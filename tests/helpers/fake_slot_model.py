"""A `SlotModel` in a few lines of arithmetic that knows what every column of its rings holds, and checks its caller."""

from dataclasses import dataclass, field

import numpy as np

from runtime.errors import UserError

MASK = (1 << 64) - 1
START = 0x9E3779B97F4A7C15


def mixed(state, number):
    """64 bits that depend on every bit of both numbers (the finalizer of SplitMix64)."""
    x = (state * 6364136223846793005 + number + START) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


class SimulatedClock:
    """Seconds that pass only when somebody lets them."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@dataclass
class FakeSlot:
    tokens: list = field(default_factory=list)
    states: list = field(default_factory=list)  # of each token, a number that depends on all tokens up to it
    rings: list = field(default_factory=list)  # of each layer, {column: (position, state)}
    written: int = 0  # positions that were ever written since the slot was empty


@dataclass(frozen=True)
class FakeSnapshot:
    slot: FakeSlot
    nbytes: int

    @property
    def tokens(self):
        return self.slot.tokens


class FakeSlotModel:
    """Logits are a function of all tokens so far; `repeats` makes the next token depend mostly on the last one.

    `windows` has a number of columns for each layer, None for one that keeps all `cache_len`. Where bits are not the
    same in any call, a token's state also depends on the function that computed it.
    """

    def __init__(
        self,
        *,
        slots=4,
        step_rows=(1, 2, 4),
        chunks=(16, 4),
        windows=(None,),
        cache_len=256,
        vocab=24,
        repeats=0.0,
        same_bits=True,
        clock=None,
        seconds=lambda kind, size, rows: 0.0,
        poison=None,
    ):
        self.slots, self.step_rows, self.chunks = slots, step_rows, chunks
        self.windows, self.cache_len, self.vocab, self.repeats = windows, cache_len, vocab, repeats
        self.same_bits_in_any_call = same_bits
        self.poison = poison  # a token after which logits are NaN
        self.rings = [None if w is None else w + max(*chunks, *step_rows) - 1 for w in windows]
        self.clock, self.seconds = clock, seconds
        self.calls = []  # (kind, size of the function, slots of the rows)
        self.copies = []
        self._slots = [self._empty() for _ in range(slots)]

    def _empty(self):
        return FakeSlot(rings=[{} for _ in self.windows])

    def tokens(self, slot):
        return self._slots[slot].tokens

    def room(self, slot):
        return self.cache_len - len(self.tokens(slot)) if None in self.windows else None

    def least_rewind(self, slot):
        written = self._slots[slot].written
        return max(self._least(written, *layer) for layer in zip(self.windows, self.rings, strict=True))

    @staticmethod
    def _least(written, window, ring):
        """The query at this position sees `window` - 1 columns before it; those before `written` - `ring` are gone."""
        return 0 if window is None or written <= ring else written - ring + window - 1

    def prefill(self, slot, ids):
        assert 1 <= len(ids) <= self.chunks[0], "as many tokens as a prefill call takes"
        size = min(size for size in self.chunks if size >= len(ids))
        return self._call("prefill", size, [(slot, token) for token in ids])[-1]

    def step(self, rows):
        assert 1 <= len(rows) <= self.step_rows[-1], "as many rows as a step takes"
        owners = [row.slot for row in rows]
        assert len([1 for i, owner in enumerate(owners) if i == 0 or owners[i - 1] != owner]) == len(set(owners)), (
            "rows of one slot are next to each other"
        )
        size = min(size for size in self.step_rows if size >= len(rows))
        return self._call("step", size, [(row.slot, row.token_id) for row in rows])

    def _call(self, kind, size, rows):
        """First all new columns are written, then every row looks at what it sees."""
        wrong = [token for _, token in rows if not 0 <= token < self.vocab]
        if wrong:
            raise UserError(f"token id {wrong[0]} is outside the vocabulary of {self.vocab}")
        self.calls.append((kind, size, [slot for slot, _ in rows]))
        if self.clock is not None:
            self.clock.now += self.seconds(kind, size, len(rows))
        places = []
        for index, token in rows:
            assert self.room(index) is None or self.room(index) > 0, "the slot has room"
            slot = self._slots[index]
            position = len(slot.tokens)
            state = mixed(slot.states[-1] if slot.states else START, token)
            if not self.same_bits_in_any_call:
                state = mixed(state, size + 1000 * (kind == "step"))
            slot.tokens.append(token)
            slot.states.append(state)
            for ring, columns in zip(slot.rings, self.rings, strict=True):
                ring[position % (columns or self.cache_len)] = position, state
            slot.written = max(slot.written, position + 1)
            places.append((slot, position))
        return np.stack([self._logits(slot, position) for slot, position in places])

    def _logits(self, slot, position):
        for window, columns, ring in zip(self.windows, self.rings, slot.rings, strict=True):
            if columns is None:  # such a layer only grows
                continue
            for seen in range(max(0, position - window + 1), position + 1):
                assert ring[seen % columns] == (seen, slot.states[seen]), "a column holds the position that is seen"
        if self.poison is not None and slot.tokens[position] == self.poison:
            return np.full(self.vocab, np.nan, np.float32)
        noise = np.random.Generator(np.random.SFC64(slot.states[position])).standard_normal(self.vocab)
        noise[mixed(0, slot.tokens[position]) % self.vocab] += self.repeats
        return noise.astype(np.float32)

    def rewind(self, slot, length):
        held = self._slots[slot]
        assert length == 0 or self.least_rewind(slot) <= length <= len(held.tokens), "the slot can be rewound so far"
        if length == 0:
            self._slots[slot] = self._empty()
        del held.tokens[length:], held.states[length:]

    def copy_slot(self, source, target, length):
        assert source != target
        self.copies.append((source, target, length))
        self._slots[target] = self._copy(self._slots[source])
        self.rewind(target, length)

    def save(self, slot):
        copy = self._copy(self._slots[slot])
        return FakeSnapshot(copy, sum(len(ring) for ring in copy.rings))

    def restore(self, slot, snapshot):
        self._slots[slot] = self._copy(snapshot.slot)

    @staticmethod
    def _copy(slot):
        return FakeSlot(list(slot.tokens), list(slot.states), [dict(ring) for ring in slot.rings], slot.written)
