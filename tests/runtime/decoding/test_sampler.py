import itertools

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from runtime.decoding.sampler import Sampler, SamplingOptions, candidates, penalized, top_logprobs
from runtime.errors import UserError

VOCAB = 1000
LOGITS = np.random.default_rng(0).normal(0, 4, VOCAB).astype(np.float32)
HISTORY = [3, 7, 7, 3, 500, 999]


def transformers_probabilities(options, history):
    """The chain that transformers builds in `_get_logits_processor`, in the same order."""
    # in float64, so that their code differs from ours only by the rounding of exp
    scores = torch.from_numpy(LOGITS.astype(np.float64))[None]
    processors = []
    if options.repetition_penalty is not None:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    processors.append(hf.TemperatureLogitsWarper(options.temperature))
    if options.top_k is not None:
        processors.append(hf.TopKLogitsWarper(options.top_k))
    if options.top_p is not None:
        processors.append(hf.TopPLogitsWarper(options.top_p))
    if options.min_p is not None:
        processors.append(hf.MinPLogitsWarper(options.min_p))
    for process in processors:
        scores = process(torch.tensor([history]), scores)
    return scores.softmax(-1)[0].numpy()


def our_probabilities(options, history):
    ids, weights = candidates(penalized(LOGITS, history, options.repetition_penalty), options)
    full = np.zeros(VOCAB)
    full[ids] = weights / weights.sum()
    return full


GRID = list(
    itertools.product([0.7, 1.0, 1.8], [None, 1, 40, 5000], [None, 0.1, 0.9, 1.0], [None, 0.0, 0.05], [None, 1.3, 0.8])
)


@pytest.mark.parametrize("settings", GRID)
def test_distribution_equals_that_of_transformers(settings):
    options = SamplingOptions(*settings)
    ours = our_probabilities(options, HISTORY)
    theirs = transformers_probabilities(options, HISTORY)
    assert ((ours > 0) == (theirs > 0)).all()
    # float64: a few units in the last place, summed over 1000 terms
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


def test_greedy_takes_the_highest_logit_after_the_penalty():
    logits = np.array([1.0, 5.0, 4.9, -2.0], np.float32)
    assert Sampler(SamplingOptions()).sample(logits, [1, 1]) == int(torch.from_numpy(logits).argmax())
    assert Sampler(SamplingOptions(repetition_penalty=1.5)).sample(logits, [1, 1]) == 2


def test_draws_follow_the_distribution():
    options = SamplingOptions(temperature=1.5, top_k=8, seed=1)
    sampler = Sampler(options)
    draws = 4000
    counts = np.bincount([sampler.sample(LOGITS, []) for _ in range(draws)], minlength=VOCAB)
    expected = transformers_probabilities(options, [0])
    assert counts[expected == 0].sum() == 0
    deviation = np.sqrt(expected * (1 - expected) / draws)
    # 5 sigma on 8 ids: a chance of 5e-6, and the seed is fixed
    assert (np.abs(counts / draws - expected) <= 5 * deviation).all()


def test_the_same_seed_draws_the_same_ids():
    def draw(seed):
        sampler = Sampler(SamplingOptions(temperature=1.0, seed=seed))
        return [sampler.sample(LOGITS, []) for _ in range(20)]

    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-300])
def test_a_tiny_temperature_is_greedy(temperature):
    assert Sampler(SamplingOptions(temperature=temperature)).sample(LOGITS, []) == LOGITS.argmax()


def test_history_beyond_the_vocabulary_is_ignored_by_the_penalty():
    np.testing.assert_array_equal(penalized(LOGITS, [5, VOCAB + 3], 1.3), penalized(LOGITS, [5], 1.3))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_broken_logits_are_refused(bad):
    logits = LOGITS.copy()
    logits[17] = bad
    with pytest.raises(UserError, match="nan or infinity"):
        Sampler(SamplingOptions()).sample(logits, [])


@pytest.mark.parametrize("k", [1, 5, VOCAB, VOCAB + 10])
def test_top_logprobs_equal_torch(k):
    expected = torch.from_numpy(LOGITS.astype(np.float64)).log_softmax(-1).topk(min(k, VOCAB))
    ours = top_logprobs(LOGITS, k)
    assert [token_id for token_id, _ in ours] == expected.indices.tolist()
    np.testing.assert_allclose([logprob for _, logprob in ours], expected.values.numpy(), rtol=1e-12)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"min_p": 1.1},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": float("inf")},
        {"seed": -1},
    ],
)
def test_options_out_of_range_are_refused_by_name(wrong):
    (name,) = wrong
    with pytest.raises(UserError, match=f"{name} is .*, expected"):
        SamplingOptions(**wrong)
