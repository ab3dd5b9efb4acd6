"""Scores and filters in float64: from logits to the ids that may be drawn and their weights.

The order is that of vLLM (vllm/v1/sample/sampler.py) and of transformers (`_get_logits_processor`), where both have a
filter: logit bias, repetition, frequency and presence penalties, temperature, top-k, top-p, and min-p last, as in
transformers. What is fast for whole rows is in `runtime.decoding.screened_draw`, which gives the same ids.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.decoding.options import SamplingOptions
from runtime.decoding.token_counts import TokenCounts

FOLD = 32  # ids that share a maximum or a sum; more are cheaper, fewer keep apart more of the likeliest ids

Scores = NDArray[np.float32] | NDArray[np.float64]
Weights = NDArray[np.float64]
Ids = NDArray[np.int64]


def changed_scores(logits: NDArray[np.float32], options: SamplingOptions, counts: TokenCounts) -> Weights:
    """Logits (vocab,) in float64, changed by the bias and the penalties of the options.

    The repetition penalty is that of Keskar et al., 2019 (CTRL, section 4.1), for the ids of prompt and output. The
    others are OpenAI's, as their documentation and vLLM (vllm/model_executor/layers/utils.py) have them:
    score - count * frequency_penalty - (count > 0) * presence_penalty, with counts of generated tokens. Ids of `counts`
    beyond the vocabulary are ignored. Raises `UserError` for a bias beyond it.
    """
    scores = logits.astype(np.float64)
    if options.logit_bias:
        options.check_vocabulary(scores.size)
        scores[list(options.logit_bias)] += list(options.logit_bias.values())
    known = counts.ids < scores.size
    ids, generated = counts.ids[known], counts.generated[known]
    changed = scores[ids]
    if options.repetition_penalty is not None:
        penalty = options.repetition_penalty
        changed = np.where(changed < 0, changed * penalty, changed / penalty)
    changed -= generated * (options.frequency_penalty or 0.0) + (generated > 0) * (options.presence_penalty or 0.0)
    scores[ids] = changed
    return scores


def candidates(scores: Scores, options: SamplingOptions) -> tuple[Ids, Weights]:
    """The ids that top-k, top-p and min-p keep from scores (vocab,), ascending, and their weights.

    A weight is the id's probability divided by that of the likeliest id. The temperature is not 0.
    """
    ids = np.arange(scores.size) if options.top_k is None else highest_ids(scores, options.top_k)
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, as it should
        weights = weights_of(scores[ids], float(scores.max()), options.temperature)
    return filtered(ids, weights, options)


def weights_of(scores: Scores, highest: float, temperature: float) -> Weights:
    """The probability of each score divided by that of the highest one."""
    return np.exp((scores.astype(np.float64) - highest) / temperature)


def filtered(ids: Ids, weights: Weights, options: SamplingOptions) -> tuple[Ids, Weights]:
    """The ids that top-p and min-p keep, and their weights."""
    if options.top_p is not None:
        kept = nucleus(weights, options.top_p)
        ids, weights = ids[kept], weights[kept]
    return likely_enough(ids, weights, options.min_p)


def likely_enough(ids: Ids, weights: Weights, min_p: float | None) -> tuple[Ids, Weights]:
    """The ids whose weights are at least `min_p`, and those weights (Nguyen et al., 2024)."""
    if min_p is None:
        return ids, weights
    kept = weights >= min_p
    return ids[kept], weights[kept]


def nucleus(weights: Weights, top_p: float) -> NDArray[np.bool_]:
    """A mask of the ids that make up the likeliest `top_p` of the mass (Holtzman et al., 2020).

    The likeliest id is always among them. Ids lighter than an equal share of the excluded mass are dropped without
    sorting: together they cannot exceed it.
    """
    excluded = (1 - top_p) * weights.sum()
    contenders = weights >= excluded / weights.size
    ascending = np.sort(weights[contenders])
    mass = weights[~contenders].sum() + np.cumsum(ascending)
    return heaviest(weights, ascending, 1 + int(np.count_nonzero(mass[:-1] > excluded)))


def heaviest(weights: Weights, ascending: Weights, count: int) -> NDArray[np.bool_]:
    """A mask of the `count` heaviest of the weights; of equal ones, the last are taken.

    `ascending` are at least the `count` heaviest weights, sorted.
    """
    lightest = ascending[-count]
    if count == ascending.size or ascending[-count - 1] < lightest:
        return weights >= lightest
    kept: NDArray[np.bool_] = weights > lightest
    equal = np.flatnonzero(weights == lightest)
    kept[equal[equal.size - (count - np.count_nonzero(kept)) :]] = True
    return kept


def highest_ids(scores: Scores, count: int) -> Ids:
    """The ids of the `count` highest scores, ascending, and of all that equal the lowest of these.

    The ids are looked for among those of at least the `count`-th highest maximum of groups of ids: every such maximum
    is a score, so that `count` scores or more are as high.
    """
    if count >= scores.size:
        return np.arange(scores.size)
    maxima = folded(scores).max(axis=0)
    if count > maxima.size:
        return np.flatnonzero(scores >= np.partition(scores, -count)[-count])
    ids = np.flatnonzero(scores >= np.partition(maxima, -count)[-count])
    found = scores[ids]
    return ids[found >= np.partition(found, -count)[-count]]


def folded(values: NDArray[Any]) -> NDArray[Any]:
    """Values (vocab,) as `FOLD` rows; up to `FOLD` - 1 values at the end are left out."""
    return values[: values.size // FOLD * FOLD].reshape(FOLD, -1)


def pick(ids: Ids, weights: Weights, uniform: float) -> int:
    """The id at which the cumulated weights exceed the share `uniform`, at least 0 and below 1, of their sum."""
    mass = np.cumsum(weights)
    target = min(uniform * mass[-1], np.nextafter(mass[-1], 0))  # the product may round up to the whole mass
    return int(ids[np.searchsorted(mass, target, side="right")])
