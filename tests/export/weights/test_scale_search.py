"""The search for scales, against trying every scale in float64, and against itself without importance."""

import numpy as np
import pytest

from export.weights.scale_search import LARGEST, MIDDLE, search

SIZE = 32
KINDS = pytest.mark.parametrize("zero_points", [False, True])


def matrix(n=16, k=128, seed=0):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def uneven(k=128, seed=1):
    """Mean squares of inputs as models have them: a few columns are far larger than the others."""
    return np.exp(2 * np.random.default_rng(seed).standard_normal(k)).astype(np.float32)


def errors(rows, scales, importance):
    """The weighted squared error of each group (N, groups), in float64."""
    spread = [np.repeat(part.astype(np.float64), SIZE, 1)[:, : rows.shape[1]] for part in (scales.scale, scales.zero)]
    restored = (scales.rounded(rows) - spread[1]) * spread[0]
    squares = importance * (restored - rows) ** 2
    return np.add.reduceat(squares, range(0, rows.shape[1], SIZE), axis=1)


def least(rows, importance):
    """The least weighted error of each symmetric group over 4000 scales of either sign."""
    groups = rows.reshape(len(rows), -1, SIZE).astype(np.float64)
    weights = importance.reshape(-1, SIZE).astype(np.float64)
    best = np.full(groups.shape[:2], np.inf)
    for factor in np.concatenate([np.linspace(0.5, 1.3, 2000), -np.linspace(0.5, 1.3, 2000)]):
        scale = np.abs(groups).max(-1, keepdims=True) / MIDDLE * factor
        numbers = np.clip(np.rint(groups / scale), -MIDDLE, LARGEST - MIDDLE)
        best = np.minimum(best, (weights * (numbers * scale - groups) ** 2).sum(-1))
    return best


@pytest.mark.parametrize("seed", range(3))
def test_it_is_within_five_percent_of_every_scale(seed):
    """22 candidates and a fit to each come close to 4000 scales; no fit is below them by more than their steps."""
    rows, importance = matrix(seed=seed), uneven(seed=seed + 1)
    found, best = errors(rows, search(rows, SIZE, importance, zero_points=False), importance), least(rows, importance)
    assert best.sum() * (1 - 1e-3) < found.sum() < 1.05 * best.sum()


@KINDS
def test_importance_lowers_the_error_that_it_weighs(zero_points):
    rows, importance = matrix(), uneven()
    weighted, plain = (search(rows, SIZE, given, zero_points=zero_points) for given in (importance, None))
    assert errors(rows, weighted, importance).sum() < 0.85 * errors(rows, plain, importance).sum()
    ones = np.ones_like(importance)
    assert errors(rows, plain, ones).sum() < errors(rows, weighted, ones).sum()


@KINDS
@pytest.mark.parametrize("importance", [1.0, 1e-30, 1e30, 0.0])
def test_even_importance_is_none(zero_points, importance):
    """Whatever its size; columns that were never used count alike too."""
    rows = matrix()
    given = np.full(rows.shape[1], importance, np.float32)
    found, plain = (search(rows, SIZE, weights, zero_points=zero_points) for weights in (given, None))
    assert np.array_equal(found.scale, plain.scale)
    assert np.array_equal(found.zero, plain.zero)


@KINDS
def test_a_group_without_importance_is_still_rounded_well(zero_points):
    rows, importance = matrix(), uneven()
    importance[:SIZE] = 0
    found, plain = (search(rows, SIZE, given, zero_points=zero_points) for given in (importance, None))
    assert np.array_equal(found.scale[:, 0], plain.scale[:, 0])


@KINDS
def test_a_last_group_may_be_shorter(zero_points):
    """What pads it counts for nothing."""
    rows, importance = matrix(k=40), uneven(40)
    scales = search(rows, SIZE, importance, zero_points=zero_points)
    alone = search(rows[:, SIZE:], 8, importance[SIZE:], zero_points=zero_points)
    assert scales.scale.shape == (16, 2)
    assert np.array_equal(scales.scale[:, 1:], alone.scale)


def test_numbers_beyond_every_scale_get_an_infinite_one():
    rows = np.full((1, SIZE), 3e38, np.float32)
    scales = search(rows, SIZE, None, zero_points=False)
    assert np.isinf(scales.scale).all()
    assert scales.rounded(rows).dtype == np.uint8
