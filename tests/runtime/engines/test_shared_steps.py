"""Compiled steps whose rows belong to several slots, on artifacts that have them."""

import numpy as np
import pytest

from runtime.engines.engine import Engine
from runtime.engines.slot_model import Row
from tests.helpers import reference
from tests.helpers.artifacts import CACHE_LEN, CASES, WINDOW, bound, onnx_shifted, random_ids
from tests.helpers.feeding import emptied, stepwise

LONGEST = CACHE_LEN - 1  # beyond the longest ring of a window, so that it wraps


@pytest.fixture(scope="module", params=[name for name, case in CASES.items() if "slots" in case.config["shape"]])
def case(request, compile_case):
    return compile_case(request.param)


@pytest.fixture
def engine(case):
    return Engine.open(case.artifact, threads=2)


def test_rows_of_any_slots_in_any_order_follow_onnxruntime(case, engine):
    """Slots at different positions share steps in an order that changes, some with several rows, some with none."""
    vocab, generator = engine.manifest.model.vocab_size, np.random.default_rng(3)
    texts = [random_ids(LONGEST, vocab, slot) for slot in range(engine.slots)]
    models = [onnx_shifted(case.graphs) for _ in texts]
    limit = bound(case.graphs, on_cpu=True)
    for slot, text in enumerate(texts):
        engine.feed(slot, text[: 4 * slot + 1])
        for i in range(4 * slot + 1):
            models[slot].step(np.array([[text[i]]]), np.array([i]))
    while True:
        at = [len(engine.tokens(slot)) for slot in range(engine.slots)]
        order = generator.integers(0, engine.slots, generator.integers(1, engine.step_rows[-1] + 1)).tolist()
        if max(at) + len(order) > LONGEST:
            break
        rows = [Row(slot, texts[slot][at[slot] + order[:i].count(slot)]) for i, slot in enumerate(order)]
        for row, found in zip(rows, engine.step(rows), strict=True):
            expected = models[row.slot].step(np.array([[row.token_id]]), np.array([at[row.slot]]))
            at[row.slot] += 1
            assert reference.difference(found[None], expected) <= limit, at


def test_a_row_gives_the_same_bits_whatever_else_a_step_has(engine):
    """In any row, in any slot, beside any others, after any use of the other slots."""
    vocab, most = engine.manifest.model.vocab_size, engine.step_rows[-1]
    ids, generator = random_ids(LONGEST, vocab, 1), np.random.default_rng(4)
    expected = stepwise(engine, 0, ids, size=most)
    for slot in range(engine.slots):
        emptied(engine)
        for i, token_id in enumerate(ids):
            others = [other for other in range(engine.slots) if other != slot]
            rows = [Row(int(other), int(generator.integers(vocab))) for other in generator.choice(others, most - 1)]
            for other in others:  # each fits again
                if len(engine.tokens(other)) + most > LONGEST:
                    engine.rewind(other, 0)
            place = int(generator.integers(most))
            found = engine.step([*rows[:place], Row(slot, token_id), *rows[place:]])[place]
            assert np.array_equal(found, expected[i]), (slot, i)


def test_a_copied_slot_goes_on_as_the_first_one(engine):
    ids = random_ids(LONGEST, engine.manifest.model.vocab_size, 1)
    target = engine.slots - 1
    for length in (WINDOW - 1, LONGEST - 4):
        emptied(engine)
        expected = stepwise(engine, 0, ids)
        engine.feed(target, ids[::-1])
        engine.copy_slot(0, target, max(length, engine.least_rewind(0)))
        start = len(engine.tokens(target))
        assert engine.tokens(target) == ids[:start]
        assert np.array_equal(stepwise(engine, target, ids[start:]), expected[start:])
        assert engine.tokens(0) == ids
