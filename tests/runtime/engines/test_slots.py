"""Slots of an engine and what they hold, on rings of ids: any order of calls leaves each row what it must see."""

import numpy as np
import pytest

from runtime.artifact.manifest import Shape
from runtime.engines import engine as module
from runtime.engines.slot_model import Row, step_all
from runtime.errors import UserError
from tests.helpers.ring_engine import VOCAB, ring_engine, seen

CACHE_LEN = 90
SHAPE = Shape(slots=3, step_rows=(1, 2, 4), prefill_chunks=(16, 5), cache_len=CACHE_LEN)
# One window, windows of two lengths, a window beside full attention, full attention alone, a window beyond the caches.
WINDOWS = [(8,), (4, 20), (8, None), (None,), (100, None)]


class Twin:
    """An engine, and the lists of tokens that its slots should hold."""

    def __init__(self, windows):
        self.engine = ring_engine(windows, SHAPE)
        self.windows = self.engine.manifest.model.cache_lens(CACHE_LEN)
        self.held = [[] for _ in range(SHAPE.slots)]

    def room(self, slot):
        limited = None in self.engine.manifest.model.sliding_window
        return CACHE_LEN - len(self.held[slot]) if limited else 10**6

    def expect(self, logits, slot):
        assert logits.tolist() == [seen(self.held[slot], self.windows)] * VOCAB

    def check(self):
        for slot, held in enumerate(self.held):
            assert list(self.engine.tokens(slot)) == held
            if held and len(held) > self.engine.least_rewind(slot) and self.room(slot):
                # the last token again, which a wrapped ring must be able to answer
                self.engine.rewind(slot, len(held) - 1)
                self.expect(self.engine.step([Row(slot, held[-1])])[0], slot)


def feed(twin, generator, slot):
    ids = ids_of(generator, min(int(generator.integers(1, 40)), twin.room(slot)))
    if ids:
        twin.held[slot] += ids
        twin.expect(twin.engine.feed(slot, ids), slot)


def prefill(twin, generator, slot):
    ids = ids_of(generator, min(int(generator.integers(1, 17)), twin.room(slot)))
    if ids:
        twin.held[slot] += ids
        twin.expect(twin.engine.prefill(slot, ids), slot)


def step(twin, generator, slot):
    del slot
    rows = []
    for other in generator.integers(0, SHAPE.slots, generator.integers(1, 5)).tolist():
        if sum(row.slot == other for row in rows) < twin.room(other):
            rows.append(Row(other, ids_of(generator, 1)[0]))
    for logits, row in zip(twin.engine.step(rows) if rows else [], rows, strict=True):
        twin.held[row.slot].append(row.token_id)
        twin.expect(logits, row.slot)


def rewind(twin, generator, slot):
    length = rewindable(twin, generator, slot)
    twin.engine.rewind(slot, length)
    del twin.held[slot][length:]


def copy(twin, generator, slot):
    target, length = int(generator.integers(0, SHAPE.slots)), rewindable(twin, generator, slot)
    twin.engine.copy_slot(slot, target, length)
    twin.held[target] = twin.held[slot][:length]


def put_back(twin, generator, slot):
    """A snapshot is put into another slot, after its own went on."""
    snapshot, kept = twin.engine.save(slot), list(twin.held[slot])
    feed(twin, generator, slot)
    target = int(generator.integers(0, SHAPE.slots))
    twin.engine.restore(target, snapshot)
    twin.held[target] = kept


def rewindable(twin, generator, slot):
    length = int(generator.integers(twin.engine.least_rewind(slot), len(twin.held[slot]) + 1))
    return 0 if generator.random() < 0.1 else length


def ids_of(generator, count):
    return generator.integers(0, VOCAB, count).tolist()


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("seed", range(4))
def test_any_order_of_calls_leaves_every_slot_its_own_tokens(windows, seed):
    twin, generator = Twin(windows), np.random.default_rng(seed)
    for _ in range(60):
        action = (feed, prefill, step, step, rewind, copy, put_back)[generator.integers(0, 7)]
        action(twin, generator, int(generator.integers(0, SHAPE.slots)))
        twin.check()


@pytest.mark.parametrize("windows", WINDOWS)
def test_least_rewind_is_where_a_ring_has_lost_a_column(windows):
    """Counted by hand: a ring of L columns holds the last L positions that were ever written to it."""
    engine = ring_engine(windows, SHAPE)
    model = engine.manifest.model
    rings, visible = model.ring_lens(CACHE_LEN, SHAPE.longest_call), model.cache_lens(CACHE_LEN)
    ids = ids_of(np.random.default_rng(1), CACHE_LEN)

    def possible(length, written):
        return all(
            max(length - window + 1, 0) >= written - ring or length == 0
            for ring, window in zip(rings, visible, strict=True)
        )

    for written in range(1, CACHE_LEN + 1):
        engine.step([Row(0, ids[written - 1])])
        least = engine.least_rewind(0)
        assert [least <= length or length == 0 for length in range(written + 1)] == [
            possible(length, written) for length in range(written + 1)
        ]
        for length in range(1, least):
            with pytest.raises(UserError, match=rf"slot 0 holds {written} tokens and cannot be rewound to {length}, "):
                engine.rewind(0, length)
        # to the fewest tokens, from there to fewer is still refused, and the same tokens again
        if 0 < least < written:
            engine.rewind(0, least)
            assert engine.least_rewind(0) == least
            for count in range(least, written):
                logits = engine.step([Row(0, ids[count])])
                assert logits[0, 0] == seen(ids[: count + 1], visible)


def test_an_emptied_slot_has_lost_nothing():
    engine = ring_engine((8,), SHAPE)
    engine.feed(0, [1] * 60)
    assert engine.least_rewind(0) == 60 - (32 - 8 + 1)
    engine.rewind(0, 0)
    assert (engine.tokens(0), engine.least_rewind(0)) == ([], 0)
    engine.feed(0, [2] * 30)
    engine.rewind(0, 1)
    assert engine.step([Row(0, 3)])[0, 0] == seen([2, 3], (8,))


def test_a_rewind_that_cannot_be_says_what_can():
    engine = ring_engine((8,), SHAPE)
    engine.feed(1, [1] * 60)
    with pytest.raises(UserError) as refused:
        engine.rewind(1, 34)
    assert str(refused.value) == (
        "slot 1 holds 60 tokens and cannot be rewound to 34, expected 0 or 35 to 60; empty it and feed the tokens again"
    )
    for length in (-1, 61):
        with pytest.raises(UserError, match=f"slot 1 holds 60 tokens and cannot be rewound to {length}, expected"):
            engine.rewind(1, length)
    assert len(engine.tokens(1)) == 60


def test_a_copy_that_cannot_be_leaves_both_slots():
    engine = ring_engine((8,), SHAPE)
    engine.feed(0, [1] * 60)
    engine.feed(1, [2, 3])
    with pytest.raises(UserError, match="slot 0 holds 60 tokens and cannot be rewound to 3, expected 0 or 35 to 60"):
        engine.copy_slot(0, 1, 3)
    assert engine.tokens(1) == [2, 3]
    assert engine.step([Row(1, 4)])[0, 0] == seen([2, 3, 4], (8,))


def test_a_snapshot_tells_what_it_holds_and_takes():
    engine = ring_engine((8, None), SHAPE)
    engine.feed(2, [5, 6, 7])
    snapshot = engine.save(2)
    # one block of 16 columns of 8 bytes in each of the two rings
    assert (snapshot.tokens, snapshot.nbytes) == ((5, 6, 7), 2 * 16 * 8)
    engine.feed(2, [1] * 40)  # rings of 32 and of 96 columns
    assert engine.save(2).nbytes == (32 + 48) * 8


@pytest.mark.parametrize(
    ("windows", "rows", "message"),
    [
        ((8,), [Row(3, 1)], "slot 3 was asked for, expected 0 to 2, which shape.slots gives"),
        ((8,), [Row(0, 1), Row(-1, 1)], "slot -1 was asked for, expected 0 to 2"),
        ((8,), [Row(0, 1), Row(1, VOCAB)], f"token id {VOCAB} is outside the vocabulary of {VOCAB}"),
        ((8,), [Row(0, -1)], "token id -1 is outside the vocabulary"),
        ((8,), [Row(0, 1)] * 5, "a call is given 5 tokens, expected 1 to 4"),
        ((8,), [], "a call is given 0 tokens, expected 1 to 4"),
        ((None,), [Row(1, 1), Row(0, 1), Row(0, 1)], "2 more tokens do not fit: the slot has room for 1 of 90"),
    ],
)
def test_a_step_that_cannot_be_changes_nothing(windows, rows, message):
    engine = ring_engine(windows, SHAPE)
    engine.feed(0, [1] * (CACHE_LEN - 1))
    before = engine.save(0)
    with pytest.raises(UserError, match=message):
        engine.step(rows)
    assert [len(engine.tokens(slot)) for slot in range(3)] == [CACHE_LEN - 1, 0, 0]
    assert all(np.array_equal(a, b) for a, b in zip(before.columns, engine.save(0).columns, strict=True))


def test_a_prompt_longer_than_a_call_is_fed_in_several():
    engine = ring_engine((8,), SHAPE)
    with pytest.raises(UserError, match="a call is given 17 tokens, expected 1 to 16"):
        engine.prefill(0, [1] * 17)
    with pytest.raises(UserError, match="a prompt is empty; expected at least one token"):
        engine.feed(0, [])
    ids = ids_of(np.random.default_rng(2), 17)
    assert engine.feed(0, ids)[0] == seen(ids, (8,))


def test_no_position_goes_beyond_what_kernels_count(monkeypatch):
    assert np.iinfo(np.int32).max == module.LAST_POSITION
    monkeypatch.setattr(module, "LAST_POSITION", 20)
    engine = ring_engine((8,), SHAPE)
    engine.feed(0, [1] * 19)
    with pytest.raises(UserError, match="the text would reach position 20, the last one; empty the slot first"):
        engine.prefill(0, [1, 2])
    engine.step([Row(0, 1)])


def test_any_number_of_rows_runs_in_as_few_steps_as_hold_them():
    engine = ring_engine((8,), Shape(slots=7, step_rows=(1, 2, 4), prefill_chunks=(4,), cache_len=16))
    logits = step_all(engine, [Row(slot, slot + 1) for slot in range(7)])
    assert logits[:, 0].tolist() == [seen([slot + 1], (8,)) for slot in range(7)]
