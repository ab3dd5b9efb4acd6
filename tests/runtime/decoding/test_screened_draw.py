"""What float32 screens is what float64 gives, and the bounds of `runtime.decoding.screened_draw` hold."""

import itertools

import numpy as np
import pytest

from runtime.decoding import screened_draw
from runtime.decoding.filters import candidates, pick
from runtime.decoding.options import SamplingOptions
from runtime.decoding.screened_draw import BLOCK, FOLD, ROUNDING, ScreenedDraw

LARGEST = 1 - 2.0**-53
FILTERS = [{}, {"top_p": 0.9}, {"top_p": 0.5, "min_p": 0.2}, {"top_p": 1.0, "min_p": 0.0}, {"min_p": 0.01}]
FILTERS += [{"top_k": 7, "top_p": 0.8}, {"top_p": 1e-9}, {"top_p": 1 - 1e-7}, {"min_p": 1e-35}]


def scores_of(kind, size, rng):
    normal = rng.normal(0, 3, size)
    made = {
        "normal": normal,
        "flat": rng.normal(0, 0.01, size),
        "equal": np.zeros(size),
        "ties": normal.round(),
        "peaked": np.where(np.arange(size) == size // 2, 60, normal),
        "masked": np.where(rng.random(size) < 0.7, -np.inf, normal),
        "far": np.where(rng.random(size) < 0.5, np.finfo(np.float32).min, 1000 + normal),
    }[kind]
    made[rng.integers(size)] = 1.5  # never are all masked
    return made.astype(np.float32)


KINDS = ["normal", "flat", "equal", "ties", "peaked", "masked", "far"]


def draw(scores, options, uniform):
    with np.errstate(over="ignore"):
        return ScreenedDraw(scores.size).draw(scores, float(scores.max()), options, uniform)


def drawn_in_float64(scores, options, uniform):
    with np.errstate(over="ignore"):
        return pick(*candidates(scores, options), uniform)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, FOLD - 1, BLOCK + 1, 1000, 7000])
def test_ids_are_those_of_float64(kind, size):
    rng = np.random.default_rng(size)
    for temperature, filters in itertools.product((0.3, 1.0, 2.5, 1e-35), FILTERS):
        options = SamplingOptions(temperature=temperature, **filters)
        scores = scores_of(kind, size, rng)
        for uniform in (0.0, LARGEST, *rng.random(4)):
            expected = drawn_in_float64(scores, options, uniform)
            assert draw(scores, options, uniform) == expected
            assert draw(scores.astype(np.float64), options, uniform) == expected


@pytest.mark.parametrize("kind", ["normal", "flat", "ties"])
def test_draws_at_the_border_of_two_ids_are_those_of_float64(kind):
    """There, the rounding of float32 would take the wrong id about every second time."""
    rng = np.random.default_rng(0)
    scores = scores_of(kind, 3000, rng)
    options = SamplingOptions(temperature=1.0)
    _, weights = candidates(scores, options)
    for place in rng.integers(0, 2999, 100):
        border = weights[: place + 1].sum() / weights.sum()
        for uniform in (border - 1e-9, border + 1e-9):
            assert draw(scores, options, uniform) == drawn_in_float64(scores, options, uniform)


@pytest.mark.parametrize("kind", ["normal", "flat", "ties"])
def test_a_nucleus_that_ends_between_two_ids_is_that_of_float64(kind):
    """Its mass reaches top_p by so little that the rounding of float32 would take one id too many or too few."""
    rng = np.random.default_rng(0)
    scores = scores_of(kind, 3000, rng)
    _, weights = candidates(scores, SamplingOptions(temperature=1.0))
    descending = np.cumsum(np.sort(weights)[::-1]) / weights.sum()
    for place in rng.integers(0, 2900, 100):
        for top_p in (descending[place] - 1e-9, descending[place] + 1e-9):
            options = SamplingOptions(temperature=1.0, top_p=top_p)
            ids, _ = candidates(scores, options)
            assert draw(scores, options, LARGEST) == ids[-1]
            for uniform in rng.random(3):
                assert draw(scores, options, uniform) == drawn_in_float64(scores, options, uniform)


def test_the_lightest_id_that_min_p_keeps_is_that_of_float64():
    scores = scores_of("normal", 3000, np.random.default_rng(0))
    for temperature in (0.7, 1.0, 1.3):
        _, weights = candidates(scores, SamplingOptions(temperature=temperature))
        for last in range(1000, 3000, 50):
            scores_so_far = scores[: last + 1]
            least = weights[last] / weights[: last + 1].max()
            kept = SamplingOptions(temperature=temperature, min_p=least * (1 - 1e-12))
            dropped = SamplingOptions(temperature=temperature, min_p=min(least * (1 + 1e-12), 1))
            assert draw(scores_so_far, kept, LARGEST) == last
            assert draw(scores_so_far, dropped, LARGEST) == drawn_in_float64(scores_so_far, dropped, LARGEST)


class NoisyDraw(ScreenedDraw):
    """With another software's exp, which is not monotonic but within the same bound."""

    def compute_weights(self, scores, highest, temperature):
        super().compute_weights(scores, highest, temperature)
        self.weights *= 1 + 4 * ROUNDING * np.random.default_rng(0).uniform(-1, 1, scores.size).astype(np.float32)


@pytest.mark.parametrize("place", range(20, 130, 10))
def test_ids_that_float32_cannot_tell_apart_are_sorted_by_float64(monkeypatch, place):
    """The contenders begin at the very weight at which the nucleus ends."""
    rng = np.random.default_rng(place)
    scores = rng.normal(-9, 1, 2000)
    scores[:150] = 3 - 1e-8 * rng.permutation(150)
    scores[150] = 4.0
    _, weights = candidates(scores, SamplingOptions(temperature=1.0))
    descending = np.sort(weights)[::-1]
    top_p = (descending[:place].sum() - descending[place] / 2) / weights.sum()
    options = SamplingOptions(temperature=1.0, top_p=top_p)
    monkeypatch.setattr(
        screened_draw, "FEW", [(1 - top_p) * weights.sum() / descending[place - 1] * (1 + x) for x in (-1e-8, 1e-8)]
    )
    screened = NoisyDraw(scores.size)
    for uniform in np.linspace(0.001, 0.999, 400):
        found = screened.draw(scores, float(scores.max()), options, uniform)
        assert found == drawn_in_float64(scores, options, uniform)


def test_hardly_any_row_is_drawn_in_float64(monkeypatch):
    """A peaked row, as those of models are, is decided by float32."""
    rng = np.random.default_rng(0)
    rows = [scores_of("normal", 5000, rng) * 2 for _ in range(50)]
    slow = []
    monkeypatch.setattr(screened_draw, "candidates", lambda *given: slow.append(given) or candidates(*given))
    for filters in ({}, {"top_p": 0.9}, {"min_p": 0.05}):
        for scores in rows:
            draw(scores, SamplingOptions(temperature=1.0, **filters), float(rng.random()))
    assert len(slow) < 0.1 * 3 * len(rows)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "ties"])
def test_float32_is_wrong_by_no_more_than_the_bounds(kind, temperature):
    scores = scores_of(kind, 20000, np.random.default_rng(1))
    distances = (scores.astype(np.float64) - scores.max()) / temperature
    exact = np.exp(distances)
    screened = ScreenedDraw(scores.size)
    screened.compute_weights(scores, float(scores.max()), temperature)
    found = screened.weights
    normal = distances > -87
    bound = exact * (3 * np.abs(distances) + 8) * ROUNDING
    assert (np.abs(found - exact) <= 1.01 * bound)[normal].all()
    assert (found[~normal] < 2.0**-125).all()
    for part in (slice(None), slice(None, None, 7), exact < 1e-3):
        kept = np.zeros(screened.padded.size, np.float32)
        kept[: scores.size][part] = found[part]
        mass = float(kept.reshape(FOLD, -1).sum(axis=0).sum(dtype=np.float64))
        assert abs(mass - exact[part].sum()) <= screened_draw.mass_error(scores.size, mass, FOLD) + 1e-30
