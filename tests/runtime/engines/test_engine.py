"""The engine on compiled artifacts, against onnxruntime on the graphs they were compiled from."""

import numpy as np
import pytest

from runtime.engines import host
from runtime.engines.engine import Engine, chunk_sizes
from runtime.errors import UserError
from tests.helpers import reference
from tests.helpers.artifacts import CACHE_LEN, CASES, WINDOW, by_slot, dequantized, onnx_shifted, random_ids
from tests.helpers.artifacts import bound as artifacts_bound

LENGTHS = (1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 3)
LONGEST = max(LENGTHS)


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
    opened.reset()
    return opened


@pytest.fixture(scope="module")
def bound(case):
    return artifacts_bound(case.graphs)


@pytest.fixture(scope="module")
def rows(case):
    record = case.graphs.record
    return [random_ids(LONGEST, record.model.vocab_size, seed) for seed in range(record.shape.batch)]


@pytest.fixture(scope="module")
def steps(case, rows):
    """Logits after each token, and the shifted caches by number of tokens: onnxruntime, one token at a time."""
    theirs = onnx_shifted(case.graphs)
    logits, caches = [], {}
    for i in range(LONGEST):
        logits.append(theirs.step(np.array([[row[i]] for row in rows]), np.full(len(rows), i)))
        caches[i + 1] = theirs.caches
    return logits, caches


def test_token_by_token_follows_onnxruntime(engine, rows, steps, bound):
    for i in range(LONGEST):
        found = engine.decode([row[i] for row in rows])
        assert reference.difference(found, steps[0][i]) <= bound, i
    assert engine.position == LONGEST


@pytest.mark.parametrize("length", LENGTHS)
def test_one_prefill(engine, rows, steps, bound, length):
    found = engine.prefill([row[:length] for row in rows])
    assert reference.difference(found, steps[0][length - 1]) <= bound


@pytest.mark.parametrize("length", LENGTHS)
def test_every_chunk_size(engine, rows, steps, bound, length):
    """Feed the same prompt through each compiled function alone, padded on the left as far as needed."""
    for size in engine.loaded.functions:
        total = -(-length // size) * size
        padded = np.array([[0] * (total - length) + row[:length] for row in rows])
        for start in range(0, total, size):
            found = engine.step(size, padded[:, start : start + size], np.full(len(rows), length - total + start))
        assert reference.difference(found, steps[0][length - 1]) <= bound, size


@pytest.mark.parametrize("pieces", [(1, 7, 11), (6, 1, 1, 11), (17, 2), (5, 5, 5, 4)])
def test_a_prompt_in_pieces(engine, rows, steps, bound, pieces):
    """Continuing a sequence allows no padding, so each piece ends in single tokens."""
    start = 0
    for piece in pieces:
        found = engine.prefill([row[start : start + piece] for row in rows])
        start += piece
        assert reference.difference(found, steps[0][start - 1]) <= bound, start


@pytest.mark.parametrize("length", LENGTHS)
def test_ring_holds_the_shifted_cache(engine, rows, steps, bound, length):
    """Position p, in column W - length + p of the graph's cache, is in slot p mod W of the engine's."""
    for feed in (
        lambda: engine.prefill([row[:length] for row in rows]),
        lambda: [engine.decode([row[i] for row in rows]) for i in range(length)],
    ):
        engine.reset()
        feed()
        for ring, shifted in zip(dequantized(by_slot(engine.caches)), dequantized(steps[1][length]), strict=True):
            slots = ring.shape[2]
            held = np.arange(max(0, length - slots), length)
            assert reference.difference(ring[:, :, held % slots], shifted[:, :, slots - length + held]) <= bound


def test_caches_stay_where_they_are(engine, rows):
    """Caches are updated in place.

    The arrays that the engine made hold the new columns at the addresses they had, and other slots keep their bits.
    """
    for cache in engine.caches:
        cache[...] = 0
    engine.prefill([row[:3] for row in rows])
    addresses = [cache.ctypes.data for cache in engine.caches]
    before = [cache.copy() for cache in by_slot(engine.caches)]
    engine.decode([row[3] for row in rows])
    assert [cache.ctypes.data for cache in engine.caches] == addresses
    for cache, old in zip(by_slot(engine.caches), before, strict=True):
        changed = np.flatnonzero((cache != old).any(axis=(0, 1, 3)))
        assert changed.tolist() == [3]


def test_reset_forgets(engine, rows):
    first = engine.prefill(rows)
    engine.decode([row[0] for row in rows])
    engine.reset()
    assert engine.position == 0
    assert np.array_equal(engine.prefill(rows), first)


def test_stale_slots_are_never_seen(engine, rows):
    """Before the first token, every slot holds the worst numbers that an earlier user of the memory may have left."""
    clean = engine.prefill([row[:5] for row in rows])
    engine.reset()
    for cache in engine.caches:
        cache[...] = np.nan if cache.dtype.kind == "f" else 127
    try:
        assert np.array_equal(engine.prefill([row[:5] for row in rows]), clean)
    finally:
        for cache in engine.caches:
            cache[...] = 0


def test_logits_belong_to_the_caller(engine, rows):
    first = engine.decode([row[0] for row in rows])
    kept = first.copy()
    engine.decode([row[1] for row in rows])
    assert np.array_equal(first, kept)
    assert (first.shape, first.dtype) == ((engine.batch, engine.manifest.model.vocab_size), np.float32)


def test_room(engine, rows):
    windowed = engine.manifest.model.sliding_window[0] is not None
    assert engine.room() == (None if windowed else CACHE_LEN)
    engine.prefill([row[:7] for row in rows])
    assert engine.room() == (None if windowed else CACHE_LEN - 7)


@pytest.fixture
def full_attention(compile_case):
    return Engine.open(compile_case("int8").artifact, threads=2)


def test_a_full_cache_refuses_and_keeps_what_it_has(full_attention):
    prompt = random_ids(CACHE_LEN, 301)
    with pytest.raises(UserError, match="41 more tokens do not fit: the caches have 40 of 40 slots free"):
        full_attention.prefill([[*prompt, 1], [1]])
    full_attention.prefill([prompt, prompt])
    assert full_attention.room() == 0
    before = [cache.copy() for cache in full_attention.caches]
    with pytest.raises(UserError, match="cache_len"):
        full_attention.decode([1, 1])
    assert all(np.array_equal(old, new) for old, new in zip(before, full_attention.caches, strict=True))
    assert full_attention.position == CACHE_LEN


def test_a_prompt_that_fills_the_cache_exactly_sees_all_of_it(compile_case, full_attention):
    case = compile_case("int8")
    rows = [random_ids(CACHE_LEN, 301, seed) for seed in (5, 6)]
    expected = onnx_shifted(case.graphs).feed(rows, [5] * (CACHE_LEN // 5))
    assert reference.difference(full_attention.prefill(rows), expected) <= reference.bound(
        case.graphs.record.model, CACHE_LEN
    )


@pytest.mark.parametrize("case_name", ["int8", "fp16"])
def test_rows_of_different_lengths(compile_case, case_name):
    """Rows are padded on the left as each one needs, then continued together."""
    engine = Engine.open(compile_case(case_name).artifact, threads=2)
    vocab = engine.manifest.model.vocab_size
    long, short = random_ids(13, vocab, 1), random_ids(2, vocab, 2)
    theirs = onnx_shifted(compile_case(case_name).graphs)
    bound = artifacts_bound(compile_case(case_name).graphs)
    size = engine.manifest.shape.prefill_chunks[0]
    expected = theirs.feed([long, short], [size] * -(-13 // size))
    assert reference.difference(engine.prefill([long, short]), expected) <= bound
    expected = theirs.step(np.array([[3], [4]]), np.array([13, 2]))
    assert reference.difference(engine.decode([3, 4]), expected) <= bound


@pytest.mark.parametrize("case_name", ["int8", "fp16"])
def test_a_row_gives_the_same_bits_whatever_the_other_holds(compile_case, case_name):
    engine = Engine.open(compile_case(case_name).artifact, threads=2)
    vocab = engine.manifest.model.vocab_size
    row, next_ids = random_ids(11, vocab, 1), random_ids(9, vocab, 2)
    answers = []
    for other in (row, random_ids(11, vocab, 3), [0] * 11, random_ids(2, vocab, 4)):
        engine.reset()
        logits = [engine.prefill([row, other])[0]]
        logits += [engine.decode([token, token // 2])[0] for token in next_ids]
        answers.append(np.array(logits))
    for answer in answers[1:]:
        assert np.array_equal(answer, answers[0])


def test_refusals_change_nothing(compile_case):
    engine = Engine.open(compile_case("fp16").artifact, threads=2)
    vocab = engine.manifest.model.vocab_size
    engine.prefill([[5, 6], [7, 8]])
    before = [cache.copy() for cache in engine.caches]
    wrong = [
        ([[1]], "1 sequences were given, expected shape.batch = 2"),
        ([[1], [1], [1]], "3 sequences were given"),
        ([[], [1]], "a prompt is empty"),
        ([[], []], "a prompt is empty"),
        ([[1, 2], [1]], "the same number of tokens"),
        ([[1], [-1]], "token id -1 is outside the vocabulary"),
        ([[vocab], [1]], f"token id {vocab} is outside the vocabulary of {vocab}"),
    ]
    for prompts, message in wrong:
        with pytest.raises(UserError, match=message):
            engine.prefill(prompts)
    with pytest.raises(UserError, match=f"token id {vocab + 7} is outside"):
        engine.decode([1, vocab + 7])
    assert engine.lengths.tolist() == [2, 2]
    assert all(np.array_equal(old, new) for old, new in zip(before, engine.caches, strict=True))


@pytest.mark.parametrize("threads", [0, -5, 5000, 10**20])
def test_absurd_numbers_of_threads(compile_case, threads):
    with pytest.raises(UserError, match=f"the number of threads is {threads}, expected 1 to [0-9]+, or none"):
        Engine.open(compile_case("windowed").artifact, threads=threads)


def test_no_position_goes_beyond_what_kernels_count(compile_case):
    engine = Engine.open(compile_case("windowed").artifact, threads=1)
    engine.lengths[:] = 2**31 - 3
    engine.decode([1])
    with pytest.raises(UserError, match="the text would reach position 2147483647, the last one"):
        engine.prefill([[1, 2]])


def test_caches_larger_than_the_machine():
    host.check_memory(10**6)
    with pytest.raises(UserError, match=r"the caches take 1,000,000\.0 GB, but this machine has"):
        host.check_memory(10**15)


AVAILABLE = [(1,), (4, 1), (16, 4, 1), (1, 4, 16), (128, 16, 1), (7, 5, 2, 1), (3, 2, 1)]


@pytest.mark.parametrize("available", AVAILABLE)
@pytest.mark.parametrize("may_pad", [True, False])
def test_chunk_sizes(available, may_pad):
    """The sum is the length, or larger by padding that fits in the first call and never costs a call."""
    smallest = min((size for size in available if size > 1), default=1)
    for length in range(1, 300):
        sizes = chunk_sizes(length, available, may_pad=may_pad)
        padding = sum(sizes) - length
        assert set(sizes) <= set(available)
        assert 0 <= padding < smallest
        assert padding == 0 or (may_pad and padding < sizes[0])
        assert sizes.count(1) <= (1 if may_pad and smallest > 1 else length if smallest == 1 else smallest - 1)


def test_chunk_sizes_of_the_worked_example():
    assert chunk_sizes(23, (16, 4, 1), may_pad=True) == [4, 16, 4]
    assert chunk_sizes(23, (16, 4, 1), may_pad=False) == [16, 4, 1, 1, 1]
    assert chunk_sizes(17, (16, 4, 1), may_pad=True) == [16, 1]
