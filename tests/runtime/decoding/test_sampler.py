import numpy as np
import pytest
import torch

from runtime.decoding.filters import candidates
from runtime.decoding.options import GREEDY, SamplingOptions
from runtime.decoding.sampler import NO_ID, SampledRow, Sampler, sample_rows
from runtime.errors import UserError

VOCAB = 1000
LOGITS = np.random.default_rng(0).normal(0, 4, VOCAB).astype(np.float32)
MIXED = [
    {},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 20},
    {"temperature": 0.9, "min_p": 0.02},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.95, "min_p": 0.01},
    {"repetition_penalty": 1.5},
    {"temperature": 1.0, "top_p": 0.9, "presence_penalty": 1.0, "frequency_penalty": 0.5},
    {"temperature": 1.0, "logit_bias": {3: 9.0, 17: -100.0}, "repetition_penalty": 1.2},
    {"presence_penalty": 2.0, "logit_bias": {5: 30.0}},
]
OPTIONS = [SamplingOptions(**each, seed=seed) for seed, each in enumerate(MIXED)]


def random_logits(rows, seed=0):
    return np.random.default_rng(seed).normal(0, 3, (rows, VOCAB)).astype(np.float32)


def one_by_one(options, logits, prompt=(3, 3, 500)):
    """The ids that a sampler draws from rows of logits (n, vocab), one after the other."""
    sampler, ids = Sampler(options, prompt), []
    for row in logits:
        ids.append(sampler.sample(row))
        sampler.append(ids[-1])
    return ids


def test_greedy_takes_the_highest_logit_after_the_penalty():
    logits = np.array([1.0, 5.0, 4.9, -2.0], np.float32)
    assert Sampler(GREEDY, [1, 1]).sample(logits) == int(torch.from_numpy(logits).argmax())
    assert Sampler(SamplingOptions(repetition_penalty=1.5), [1, 1]).sample(logits) == 2


def test_a_penalty_of_generated_tokens_leaves_the_prompt_alone():
    logits = np.array([1.0, 5.0, 4.9, 4.7], np.float32)
    sampler = Sampler(SamplingOptions(frequency_penalty=0.15), [1, 1, 1])
    ids = []
    for _ in range(4):
        ids.append(sampler.sample(logits))
        sampler.append(ids[-1])
    # the scores are 5, 4.9, 4.7; then 4.85, 4.9; 4.85, 4.75; 4.7, 4.75
    assert ids == [1, 2, 1, 2]


def test_a_new_text_is_counted_anew_and_draws_go_on():
    sampler = Sampler(SamplingOptions(temperature=1.0, presence_penalty=2.0, repetition_penalty=2.0, seed=1))
    plain = sampler.scores(LOGITS)
    sampler.append(5)
    assert (sampler.scores(LOGITS) != plain).any()
    sampler.begin([])
    np.testing.assert_array_equal(sampler.scores(LOGITS), plain)
    assert sampler.generated == 1


def probabilities(options):
    ids, weights = candidates(LOGITS, options)
    full = np.zeros(VOCAB)
    full[ids] = weights / weights.sum()
    return full


@pytest.mark.parametrize("filters", [{}, {"top_k": 8}, {"top_p": 0.8}, {"min_p": 0.1}])
def test_draws_follow_the_distribution(filters):
    options = SamplingOptions(temperature=1.5, seed=1, **filters)
    draws = 4000
    counts = np.bincount(one_by_one(options, np.tile(LOGITS, (draws, 1))), minlength=VOCAB)
    expected = probabilities(options)
    assert counts[expected == 0].sum() == 0
    likely = draws * expected >= 20  # so that the deviation is close to that of a normal distribution
    deviation = np.sqrt(expected * (1 - expected) / draws)
    # 5 sigma on at most 50 ids: a chance of 3e-5, and the seed is fixed
    assert likely.sum() in range(5, 51)
    assert (np.abs(counts / draws - expected) <= 5 * deviation)[likely].all()


@pytest.mark.parametrize("options", [each for each in OPTIONS if each.temperature])
def test_a_seed_draws_by_its_numbers_from_the_cumulated_probabilities(options):
    logits = random_logits(50)
    ids = one_by_one(options, logits)
    uniform = np.random.Generator(np.random.PCG64(options.seed)).random(50)
    sampler = Sampler(options, (3, 3, 500))
    for row, draw, token_id in zip(logits, uniform, ids, strict=True):
        kept, weights = candidates(sampler.scores(row), options)
        mass = np.cumsum(weights)
        assert token_id == kept[np.searchsorted(mass, draw * mass[-1], side="right")]
        sampler.append(token_id)


def test_the_same_seed_draws_the_same_ids():
    def draw(seed):
        return one_by_one(SamplingOptions(temperature=1.0, seed=seed), np.tile(LOGITS, (20, 1)))

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)
    assert draw(None) != draw(None)


def test_a_draw_can_be_asked_for_again_in_any_order():
    sampler = Sampler(SamplingOptions(seed=9))
    stream = np.random.Generator(np.random.PCG64(9)).random(100).tolist()
    for number in (0, 1, 2, 2, 1, 0, 50, 99, 3, 98):
        assert sampler.draw(number) == stream[number]
    unseeded = Sampler(SamplingOptions())
    assert unseeded.draw(4) == unseeded.draw(4)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    assert Sampler(SamplingOptions(temperature=temperature)).sample(LOGITS) == LOGITS.argmax()


def test_rows_give_the_same_ids_whatever_else_is_in_the_call():
    logits = random_logits(len(OPTIONS))
    alone = [one_by_one(options, logits[[i]])[0] for i, options in enumerate(OPTIONS)]
    rng = np.random.default_rng(1)
    for _ in range(20):
        chosen = rng.permutation(len(OPTIONS))[: rng.integers(1, len(OPTIONS) + 1)]
        rows = [SampledRow(Sampler(OPTIONS[i], (3, 3, 500))) for i in chosen]
        mixed = logits[chosen]
        spoiled = rng.random(len(chosen)) < 0.2
        mixed[spoiled, rng.integers(VOCAB)] = rng.choice([np.nan, np.inf])
        expected = [NO_ID if bad else alone[i] for i, bad in zip(chosen, spoiled, strict=True)]
        assert sample_rows(mixed, rows).tolist() == expected


@pytest.mark.parametrize("options", OPTIONS)
def test_rows_of_drafts_are_drawn_as_one_by_one(options):
    """Also after some drafts were wrong: what was drawn for them is drawn again."""
    logits = np.tile(LOGITS, (40, 1)) + random_logits(40) / 10  # the same ids are likely, so that penalties matter
    expected = one_by_one(options, logits)
    rng = np.random.default_rng(2)
    sampler, found = Sampler(options, (3, 3, 500)), []
    while len(found) < 32:
        start = len(found)
        drafts = expected[start : start + int(rng.integers(0, 8))]
        if drafts and rng.random() < 0.5:
            drafts[rng.integers(len(drafts))] += 1
        rows = [SampledRow(sampler, drafts[:count]) for count in range(len(drafts) + 1)]
        ids = sample_rows(logits[start : start + len(rows)], rows).tolist()
        right = next((i for i, draft in enumerate(drafts) if draft != ids[i]), len(drafts))
        for token_id in ids[: right + 1]:
            sampler.append(token_id)
            found.append(token_id)
    assert found == expected[: len(found)]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(temperature=1.0), OPTIONS[7]])
def test_broken_logits_are_refused(bad, options):
    logits = LOGITS.copy()
    logits[17] = bad
    with pytest.raises(UserError, match="nan or infinity"):
        Sampler(options).sample(logits)
    with pytest.raises(UserError, match="nan or infinity"):
        Sampler(options).sample(np.full(VOCAB, -np.inf, np.float32))


@pytest.mark.parametrize("options", [GREEDY, SamplingOptions(temperature=1.0, top_p=0.5), OPTIONS[7]])
def test_ids_of_minus_infinity_are_never_drawn(options):
    logits = np.full(VOCAB, -np.inf, np.float32)
    logits[[4, 8]] = 1.0, 1.25
    assert set(one_by_one(options, np.tile(logits, (20, 1)))) <= {4, 8}


def test_a_bias_beyond_the_vocabulary_is_refused():
    with pytest.raises(UserError, match="logit_bias names the token id 1000, expected 0 to 999"):
        Sampler(SamplingOptions(logit_bias={VOCAB: 1.0})).sample(LOGITS)
