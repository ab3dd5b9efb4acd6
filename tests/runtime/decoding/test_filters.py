"""Scores and filters against the processors of transformers and against formulas written out in numpy."""

import itertools

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as hf

from runtime.decoding.filters import candidates, changed_scores, heaviest, highest_ids, nucleus, pick
from runtime.decoding.options import SamplingOptions
from runtime.decoding.token_counts import TokenCounts
from runtime.errors import UserError

VOCAB = 1000
LOGITS = np.random.default_rng(0).normal(0, 4, VOCAB).astype(np.float32)
PROMPT, GENERATED = [3, 7, 7, 3], [500, 999, 500]


def counts_of(prompt, generated):
    counts = TokenCounts(prompt)
    for token_id in generated:
        counts.add(token_id)
    return counts


def transformers_probabilities(options):
    """The chain that transformers builds in `_get_logits_processor`, in the same order."""
    # in float64, so that their code differs from ours only by the rounding of exp
    scores = torch.from_numpy(LOGITS.astype(np.float64))[None]
    processors = []
    if options.logit_bias is not None:
        biases = {(token_id,): float(bias) for token_id, bias in options.logit_bias.items()}
        processors.append(hf.SequenceBiasLogitsProcessor(biases))
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
        scores = process(torch.tensor([PROMPT + GENERATED]), scores)
    return scores.softmax(-1)[0].numpy()


def our_probabilities(options):
    scores = changed_scores(LOGITS, options, counts_of(PROMPT, GENERATED))
    ids, weights = candidates(scores, options)
    full = np.zeros(VOCAB)
    full[ids] = weights / weights.sum()
    return full


GRID = list(
    itertools.product([0.7, 1.0, 1.8], [None, 1, 40, 5000], [None, 0.1, 0.9, 1.0], [None, 0.0, 0.05], [None, 1.3, 0.8])
)
# exact in float32, in which transformers keeps them
BIASES = {int(LOGITS.argmax()): -7.5, 3: 12.0, 500: 9.25}


@pytest.mark.parametrize("biases", [None, BIASES])
@pytest.mark.parametrize("settings", GRID)
def test_distribution_equals_that_of_transformers(settings, biases):
    options = SamplingOptions(*settings, logit_bias=biases)
    ours, theirs = our_probabilities(options), transformers_probabilities(options)
    assert ((ours > 0) == (theirs > 0)).all()
    # float64: a few units in the last place, summed over 1000 terms
    np.testing.assert_allclose(ours, theirs, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("repetition", [None, 1.3])
@pytest.mark.parametrize(("presence", "frequency"), [(0.5, None), (None, -0.75), (1.5, 0.25), (-2.0, 2.0)])
def test_penalties_are_the_formula_of_openai(presence, frequency, repetition):
    options = SamplingOptions(
        presence_penalty=presence, frequency_penalty=frequency, repetition_penalty=repetition, logit_bias={7: 5.0}
    )
    expected = LOGITS.astype(np.float64)
    expected[7] += 5
    for token_id in {*PROMPT, *GENERATED} if repetition else ():
        expected[token_id] *= repetition if expected[token_id] < 0 else 1 / repetition
    for token_id in range(VOCAB):
        count = GENERATED.count(token_id)
        expected[token_id] -= count * (frequency or 0) + (count > 0) * (presence or 0)
    found = changed_scores(LOGITS, options, counts_of(PROMPT, GENERATED))
    # a quotient and a product with the inverse differ by a few units in the last place of numbers below 32
    np.testing.assert_allclose(found, expected, rtol=0, atol=2.0**-45)


def test_ids_beyond_the_vocabulary_are_ignored_by_penalties_and_refused_as_a_bias():
    options = SamplingOptions(repetition_penalty=1.3, frequency_penalty=1.0)
    found = changed_scores(LOGITS, options, counts_of([5, VOCAB + 3], [6, VOCAB]))
    np.testing.assert_array_equal(found, changed_scores(LOGITS, options, counts_of([5], [6])))
    with pytest.raises(UserError, match=f"logit_bias names the token id {VOCAB}"):
        changed_scores(LOGITS, SamplingOptions(logit_bias={VOCAB: 1.0}), counts_of([], []))


@pytest.mark.parametrize("size", [1, 5, 31, 32, 33, 64, 1000])
def test_the_highest_ids_are_those_of_a_whole_sort(size):
    rng = np.random.default_rng(size)
    for scores in (rng.normal(size=size), rng.integers(0, 9, size), np.zeros(size), np.arange(size)):
        for count in (1, 2, size // 2 + 1, size, size + 3):
            scores = scores.astype(np.float32)
            lowest = np.sort(scores)[-min(count, size)]
            np.testing.assert_array_equal(highest_ids(scores, count), np.flatnonzero(scores >= lowest))


def test_of_equal_weights_the_last_are_kept():
    weights = np.array([1.0, 0.5, 1.0, 0.5, 0.25])
    assert np.flatnonzero(heaviest(weights, np.sort(weights), 3)).tolist() == [0, 2, 3]
    assert np.flatnonzero(heaviest(weights, np.sort(weights), 5)).tolist() == [0, 1, 2, 3, 4]
    # transformers sorts in ascending order, stably, and removes from the front
    equal = torch.zeros(1, 5, dtype=torch.float64)
    theirs = hf.TopPLogitsWarper(0.5)(None, equal)[0].isfinite().numpy()
    np.testing.assert_array_equal(nucleus(np.ones(5), 0.5), theirs)


def test_what_weighs_nothing_is_never_picked():
    ids, weights = np.arange(4), np.array([0.0, 1.0, 0.5, 0.0])
    assert pick(ids, weights, 0.0) == 1
    assert pick(ids, weights, 1 - 2.0**-53) == 2
