"""The engine on compiled artifacts, against onnxruntime on the graphs they were compiled from."""

import numpy as np
import pytest

from runtime.engines import host
from runtime.engines.engine import Engine
from runtime.engines.slot_model import Row
from runtime.errors import UserError
from tests.helpers import reference
from tests.helpers.artifacts import (
    CACHE_LEN,
    CASES,
    WINDOW,
    by_column,
    dequantized,
    onnx_shifted,
    random_ids,
    rings_of,
)
from tests.helpers.artifacts import bound as artifacts_bound
from tests.helpers.feeding import emptied, stepwise

LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3)
LONGEST = CACHE_LEN - 1  # beyond the longest ring of a window, so that it wraps


@pytest.fixture(scope="module", params=CASES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def case(compile_case, name):
    return compile_case(name)


@pytest.fixture(scope="module")
def opened(case):
    return Engine.open(case.artifact, threads=2)


@pytest.fixture
def engine(opened):
    return emptied(opened)


@pytest.fixture(scope="module")
def bound(case):
    return artifacts_bound(case.graphs, on_cpu=True)


@pytest.fixture(scope="module")
def ids(case):
    return random_ids(LONGEST, case.graphs.record.model.vocab_size)


@pytest.fixture(scope="module")
def steps(case, ids):
    """Logits after each token, and the shifted caches by number of tokens: onnxruntime, one token at a time."""
    theirs = onnx_shifted(case.graphs)
    logits, caches = [], {}
    for i in range(LONGEST):
        logits.append(theirs.step(np.array([[ids[i]]]), np.array([i]))[0])
        caches[i + 1] = theirs.caches
    return logits, caches


def by_chunks(engine, slot, ids, size):
    return [engine.prefill(slot, ids[start : start + size]) for start in range(0, len(ids), size)][-1]


def test_token_by_token_follows_onnxruntime(engine, ids, steps, bound):
    slot = engine.slots - 1
    for i, found in enumerate(stepwise(engine, slot, ids)):
        assert reference.difference(found[None], steps[0][i][None]) <= bound, i
    assert engine.tokens(slot) == ids


@pytest.mark.parametrize("length", [*LENGTHS, LONGEST])
def test_every_chunk_size(engine, ids, steps, bound, length):
    """Feed the same prompt in calls of each size alone, the last one padded on the right as far as needed."""
    for size in engine.chunks:
        emptied(engine)
        found = by_chunks(engine, 0, ids[:length], size)
        assert reference.difference(found[None], steps[0][length - 1][None]) <= bound, size


@pytest.mark.parametrize("size", [2, 3, 4])
def test_padded_prefill_at_any_position(engine, ids, steps, bound, size):
    """Calls that have room for more, at positions that no call's size divides, to beyond the end of a ring."""
    largest = engine.chunks[0]
    for start in range(0, LONGEST - size + 1, size):
        found = engine.prefill(0, ids[start : start + size], size=largest)
        assert reference.difference(found[None], steps[0][start + size - 1][None]) <= bound, start


@pytest.mark.parametrize("pieces", [(1, 7, 11), (6, 1, 1, 11), (17, 2), (5, 5, 5, 4)])
def test_a_prompt_in_pieces(engine, ids, steps, bound, pieces):
    start = 0
    for piece in pieces:
        found = engine.feed(0, ids[start : start + piece])
        start += piece
        assert reference.difference(found[None], steps[0][start - 1][None]) <= bound, start


def test_rows_of_one_slot_are_its_consecutive_tokens(engine, ids, steps, bound):
    for rows in engine.step_rows:
        emptied(engine)
        for start in range(0, LONGEST - rows + 1, rows):
            found = engine.step([Row(0, token_id) for token_id in ids[start : start + rows]])
            assert reference.difference(found, np.stack(steps[0][start : start + rows])) <= bound, start


def test_every_way_of_feeding_gives_the_same_bits(engine, ids):
    """A token's logits do not depend on the call that computes it: its function, its padding, its rows, its slot."""
    expected = stepwise(engine, 0, ids)
    for size in engine.step_rows:
        emptied(engine)
        assert np.array_equal(stepwise(engine, engine.slots - 1, ids, size), expected), size
        emptied(engine)
        for start in range(0, LONGEST - size + 1, size):
            found = engine.step([Row(0, token_id) for token_id in ids[start : start + size]])
            assert np.array_equal(found, expected[start : start + size]), (size, start)
    for size in engine.chunks:
        for fed in sorted({size, size // 2, 1}):
            emptied(engine)
            for start in range(0, LONGEST - fed + 1, fed):
                found = engine.prefill(0, ids[start : start + fed], size=size)
                assert np.array_equal(found, expected[start + fed - 1]), (size, fed, start)


@pytest.mark.parametrize("length", LENGTHS)
def test_ring_holds_the_shifted_cache(engine, ids, steps, bound, length):
    """Position p, in column W - length + p of the graph's cache, is in column p mod L of the engine's."""
    slot = engine.slots - 1
    for feed in (engine.feed, lambda slot, ids: stepwise(engine, slot, ids)):
        emptied(engine)
        feed(slot, ids[:length])
        for ring, shifted in zip(dequantized(by_column(rings_of(engine))), dequantized(steps[1][length]), strict=True):
            window = shifted.shape[2]
            held = np.arange(max(0, length - window), length)
            found = ring[slot : slot + 1, :, held % ring.shape[2]]
            assert reference.difference(found, shifted[:, :, window - length + held]) <= bound


def test_rings_stay_where_they_are(engine, ids):
    """Rings are updated in place.

    The arrays that the engine made hold the new column at the addresses they had, and all others keep their bits.
    """
    rings, slot = rings_of(engine), engine.slots - 1
    for ring in rings:
        ring[...] = 0
    engine.feed(slot, ids[:3])
    addresses = [ring.ctypes.data for ring in rings]
    before = [ring.copy() for ring in by_column(rings)]
    engine.step([Row(slot, ids[3])])
    assert [ring.ctypes.data for ring in rings_of(engine)] == addresses
    for ring, old in zip(by_column(rings), before, strict=True):
        changed = np.argwhere((ring != old).any(axis=(1, 3)))
        assert changed.tolist() == [[slot, 3]]


def test_a_slot_that_is_used_again_forgets(engine, ids):
    """Whatever the columns held before, were it numbers that no text gives."""
    first = [engine.feed(0, ids[:5]), *stepwise(engine, 0, ids[5:])]
    for left in (lambda _: None, worst_numbers):
        engine.rewind(0, 0)
        engine.feed(0, ids[::-1])
        engine.rewind(0, 0)
        left(rings_of(engine))
        try:
            again = [engine.feed(0, ids[:5]), *stepwise(engine, 0, ids[5:])]
        finally:
            for ring in rings_of(engine):
                ring[...] = 0
        assert np.array_equal(first, again)


def worst_numbers(rings):
    for ring in rings:
        ring[...] = np.nan if ring.dtype.kind == "f" else 127


def test_a_rewound_slot_goes_on_as_a_fresh_one(engine, ids):
    """At every length to which it can be rewound, beyond the end of a ring."""
    vocab_size, slot = engine.manifest.model.vocab_size, engine.slots - 1
    expected = stepwise(engine, slot, ids)
    guess = random_ids(LONGEST, vocab_size, 9)
    for length in range(max(engine.least_rewind(slot), 1), LONGEST - 2):
        engine.rewind(slot, length)
        stepwise(engine, slot, guess[length:])  # which is wrong, and leaves its columns
        engine.rewind(slot, length)
        assert np.array_equal(stepwise(engine, slot, ids[length : length + 2]), expected[length : length + 2]), length
        stepwise(engine, slot, ids[length + 2 :])


def test_what_was_saved_goes_on_in_any_slot(engine, ids):
    expected = stepwise(engine, 0, ids)
    emptied(engine)
    for length in (1, WINDOW, LONGEST - 3):
        engine.rewind(0, 0)
        stepwise(engine, 0, ids[:length])
        snapshot = engine.save(0)
        assert snapshot.nbytes == sum(part.nbytes for part in snapshot.columns) > 0
        stepwise(engine, 0, ids[: LONGEST - length])
        for slot in range(engine.slots):
            engine.restore(slot, snapshot)
            assert engine.tokens(slot) == ids[:length]
            assert np.array_equal(stepwise(engine, slot, ids[length:]), expected[length:])


def test_logits_belong_to_the_caller(engine, ids):
    for call in (engine.prefill, engine.feed, lambda slot, ids: engine.step([Row(slot, i) for i in ids])):
        first = call(0, ids[:1])
        kept = first.copy()
        call(0, ids[1:2])
        assert np.array_equal(first, kept)
        assert (first.shape[-1], first.dtype) == (engine.manifest.model.vocab_size, np.float32)


def test_room(engine, ids):
    windowed = engine.manifest.model.sliding_window[0] is not None
    assert engine.room(0) == (None if windowed else CACHE_LEN)
    engine.feed(0, ids[:7])
    assert engine.room(0) == (None if windowed else CACHE_LEN - 7)
    assert engine.room(engine.slots - 1) == (None if windowed else CACHE_LEN - 7 * (engine.slots == 1))


@pytest.fixture
def full_attention(compile_case):
    return Engine.open(compile_case("int8").artifact, threads=2)


def test_a_full_slot_refuses_and_keeps_what_it_has(full_attention):
    prompt = random_ids(CACHE_LEN, 301)
    with pytest.raises(UserError, match="41 more tokens do not fit: the slot has room for 40 of 40; compile with a la"):
        full_attention.feed(1, [*prompt, 1])
    assert full_attention.tokens(1) == []
    full_attention.feed(1, prompt)
    assert full_attention.room(1) == 0
    before = [ring.copy() for ring in rings_of(full_attention)]
    for call in (lambda: full_attention.step([Row(0, 1), Row(1, 1)]), lambda: full_attention.prefill(1, [1])):
        with pytest.raises(UserError, match="cache_len"):
            call()
    assert all(np.array_equal(old, new) for old, new in zip(before, rings_of(full_attention), strict=True))
    assert [len(full_attention.tokens(slot)) for slot in range(2)] == [0, CACHE_LEN]


def test_a_prompt_that_fills_a_slot_exactly_sees_all_of_it(compile_case, full_attention):
    case = compile_case("int8")
    ids = random_ids(CACHE_LEN, 301, 5)
    expected = onnx_shifted(case.graphs).feed([ids], [5] * (CACHE_LEN // 5))
    assert reference.difference(full_attention.feed(1, ids)[None], expected) <= reference.bound(
        case.graphs.record.model, CACHE_LEN
    )


@pytest.mark.parametrize("threads", [0, -5, 5000, 10**20])
def test_absurd_numbers_of_threads(compile_case, threads):
    with pytest.raises(UserError, match=f"the number of threads is {threads}, expected 1 to [0-9]+, or none"):
        Engine.open(compile_case("windowed").artifact, threads=threads)


def test_caches_larger_than_the_machine():
    host.check_memory(10**6)
    with pytest.raises(UserError, match=r"the caches take 1,000,000\.0 GB, but this machine has"):
        host.check_memory(10**15)
    with pytest.raises(UserError, match=r"the caches, and the weights in huge pages, take .* unset RUNTIME_HUGE_PAGES"):
        host.check_memory(10**6, 10**15)
