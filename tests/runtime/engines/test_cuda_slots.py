"""Slots on the CUDA engine, compared with the same kernels and rings in the host's memory."""

import numpy as np
import pytest

from runtime.engines.cuda_memory import CudaMemory
from runtime.engines.engine import Row
from tests.helpers.artifacts import random_ids
from tests.helpers.feeding import emptied

SLOTS, LONGEST = 3, 20


def prefill(engine, slot, ids):
    return engine.prefill(slot, ids)


def step(engine, *rows):
    return engine.step([Row(slot, token_id) for slot, token_id in rows])


def both(engines, call, *arguments):
    """The same call of both engines, which must give the same bits."""
    found, expected = (call(engine, *arguments) for engine in (engines.device, engines.host))
    np.testing.assert_array_equal(found, expected)
    assert np.isfinite(found).all()
    return found


def test_slots_are_filled_stepped_and_taken_back(engines):
    """Rows of all slots in any order, several of one slot, and fewer rows than a step has."""
    ids = random_ids(60, engines.host.manifest.model.vocab_size)
    for engine in (engines.device, engines.host):
        emptied(engine)
    both(engines, prefill, 2, ids[:6])
    both(engines, prefill, 0, ids[6:9])
    both(engines, step, (1, ids[9]), (2, ids[10]), (0, ids[11]), (2, ids[12]))
    both(engines, prefill, 2, ids[13:18])
    both(engines, step, (0, ids[18]), (0, ids[19]), (0, ids[20]))
    for engine in (engines.device, engines.host):
        engine.rewind(0, 5)
    both(engines, step, (2, ids[21]), (0, ids[22]))


def test_a_function_gives_the_same_bits_whatever_shares_its_call(engines):
    """Alone in one slot, and among others in another."""
    engine, ids = emptied(engines.device), random_ids(20, engines.host.manifest.model.vocab_size, seed=4)
    engine.prefill(1, ids[10:16])
    engine.prefill(0, ids[:3])
    engine.prefill(2, ids[:3])
    for i in range(3, 9):
        alone = engine.step([Row(0, ids[i])], size=4)[0]
        others = [Row(1, ids[-i]), Row(1, ids[i])]
        among = engine.step([*others[: i % 3], Row(2, ids[i]), *others[i % 3 :]], size=4)[i % 3]
        np.testing.assert_array_equal(among, alone)


def test_slots_are_copied_saved_and_restored(engines):
    ids = random_ids(LONGEST, engines.host.manifest.model.vocab_size, seed=1)
    for engine in (engines.device, engines.host):
        emptied(engine)
        for start in range(0, 18, 6):
            engine.prefill(1, ids[start : start + 6])
    kept = [engine.save(1) for engine in (engines.device, engines.host)]
    assert kept[0].nbytes == kept[1].nbytes > 0
    for one, other in zip(*(snapshot.columns for snapshot in kept), strict=True):
        np.testing.assert_array_equal(one[:, :18], other[:, :18])  # the rest of a block may hold anything
    for engine in (engines.device, engines.host):
        engine.copy_slot(1, 2, 17)
    expected = both(engines, step, (1, ids[18]), (2, ids[17]))[0]
    both(engines, step, (2, ids[18]))
    for engine, snapshot in zip((engines.device, engines.host), kept, strict=True):
        engine.rewind(1, 0)
        engine.prefill(1, ids[5:8])  # something else takes the slot
        engine.restore(0, snapshot)
        engine.restore(1, snapshot)
    found = both(engines, step, (0, ids[18]), (1, ids[18]))
    np.testing.assert_array_equal(found, np.stack([expected, expected]))


def test_no_slot_is_touched_by_a_step_of_another(engines):
    ids = random_ids(6, engines.host.manifest.model.vocab_size, seed=2)
    engine = emptied(engines.device)
    engine.prefill(0, ids)
    before = engine.save(0).columns
    engine.prefill(1, ids[::-1])
    step(engine, (2, ids[0]), (1, ids[1]))
    for one, other in zip(before, engine.save(0).columns, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", ["wait", "wait_for"])
def test_a_missing_wait_shows(engines, monkeypatch, name):
    """That the stand-in is late enough: without the waits of a call or of a snapshot, what they return is stale."""
    ids = random_ids(12, engines.host.manifest.model.vocab_size, seed=3)
    engine = emptied(engines.device)
    engine.prefill(0, ids[:6])
    logits, snapshot = step(engine, (0, ids[6])), engine.save(0)
    engine.prefill(1, ids[6:])
    step(engine, (1, ids[0]))
    engine.save(1)
    engine.rewind(0, 6)
    monkeypatch.setattr(CudaMemory, name, lambda *_: None)
    same = [
        np.array_equal(step(engine, (0, ids[6])), logits),
        all(map(np.array_equal, engine.save(0).columns, snapshot.columns)),
    ]
    monkeypatch.undo()
    engine.loaded.functions["step_1"]()  # what is still queued reads arrays of this engine
    assert same == {"wait": [False, True], "wait_for": [True, False]}[name]
