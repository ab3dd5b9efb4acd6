"""Every figure against llama.cpp's definition of it, computed here token by token with sums, as llama.cpp does."""

import math

import numpy as np
import pytest

from build.tools.quality.figures import Distribution, TokenFigures, root_mean_square

STEPS, ROWS, VOCAB = 60, 3, 17
TEXT_BYTES, WEIGHT_BYTES = 700, 7
# Two float64 computations of the same sums, of which the longest have 180 terms, in another order.
ROUNDING = 1e-12


@pytest.fixture(scope="module")
def logits():
    generator = np.random.default_rng(0)
    baseline = generator.standard_normal((STEPS, ROWS, VOCAB)).astype(np.float32) * 3
    variant = baseline + generator.standard_normal(baseline.shape).astype(np.float32) * np.float32(0.3)
    return baseline, variant, generator.integers(VOCAB, size=(STEPS, ROWS))


@pytest.fixture(scope="module")
def found(logits):
    figures = TokenFigures()
    for baseline, variant, targets in zip(*logits, strict=True):
        figures.add(Distribution.of(variant), Distribution.of(baseline), targets)
    return figures.quality("text", "int8", TEXT_BYTES, WEIGHT_BYTES)


@pytest.fixture(scope="module")
def tokens(logits):
    """For each token: loss, the baseline's loss, divergence, whether the likeliest is the same."""
    result = []
    for base, other, target in zip(*(array.reshape(STEPS * ROWS, -1) for array in logits), strict=True):
        p = [math.exp(float(x)) for x in base]
        q = [math.exp(float(x)) for x in other]
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        divergence = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        came = int(target[0])
        result.append((-math.log(q[came]), -math.log(p[came]), divergence, p.index(max(p)) == q.index(max(q))))
    return result


def mean_and_uncertainty(values):
    """llama.cpp's: the mean, and sqrt((mean of squares - square of the mean) / (n - 1))."""
    n, total, squares = len(values), sum(values), sum(value * value for value in values)
    return total / n, math.sqrt((squares / n - (total / n) ** 2) / (n - 1))


def close(estimate, value, error):
    assert estimate.value == pytest.approx(value, rel=ROUNDING, abs=ROUNDING)
    # a variance as a difference of two sums loses digits that the two share
    assert estimate.error == pytest.approx(error, rel=1e-9)


def test_perplexity_and_its_error(found, tokens):
    mean, error = mean_and_uncertainty([loss for loss, *_ in tokens])
    close(found.perplexity, math.exp(mean), math.exp(mean) * error)


def test_log_ratio_is_paired(found, tokens):
    """llama.cpp subtracts twice the covariance over n - 1 from the sum of the squared errors."""
    losses, base = [token[0] for token in tokens], [token[1] for token in tokens]
    n = len(tokens)
    (mean, error), (base_mean, base_error) = mean_and_uncertainty(losses), mean_and_uncertainty(base)
    covariance = (sum(a * b for a, b in zip(losses, base, strict=True)) / n - mean * base_mean) / (n - 1)
    close(found.log_ratio, mean - base_mean, math.sqrt(error**2 + base_error**2 - 2 * covariance))
    assert found.log_ratio.error < 0.5 * math.hypot(error, base_error)  # pairing is what makes it small


def test_divergence_and_its_percentiles(found, tokens):
    divergences = sorted(token[2] for token in tokens)
    close(found.divergence, *mean_and_uncertainty(divergences))
    assert found.divergence_maximum == pytest.approx(divergences[-1], rel=1e-9)
    for name, value in found.divergence_percentiles.items():  # between two values, in proportion
        place = float(name) / 100 * (len(divergences) - 1)
        below = int(place)
        expected = divergences[below] + (place - below) * (divergences[below + 1] - divergences[below])
        assert value == pytest.approx(expected, rel=1e-9)
    assert list(found.divergence_percentiles) == ["50", "90", "99", "99.9"]


def test_delta_p_in_percent(found, tokens):
    changes = [math.exp(-loss) - math.exp(-base) for loss, base, *_ in tokens]
    mean, error = mean_and_uncertainty(changes)
    close(found.delta_p, 100 * mean, 100 * error)
    square, square_error = mean_and_uncertainty([change * change for change in changes])
    root = math.sqrt(square)
    close(found.delta_p_rms, 100 * root, 100 * 0.5 / root * square_error)


def test_same_top_in_percent(found, tokens):
    share = sum(token[3] for token in tokens) / len(tokens)
    assert 0.5 < share < 1
    close(found.same_top, 100 * share, 100 * math.sqrt(share * (1 - share) / (len(tokens) - 1)))


def test_bits_per_byte_and_counts(found, tokens):
    assert found.bits_per_byte == pytest.approx(sum(token[0] for token in tokens) / math.log(2) / TEXT_BYTES)
    assert (found.tokens, found.weight_bytes) == (STEPS * ROWS, WEIGHT_BYTES)
    assert (found.text, found.variant) == ("text", "int8")


def test_the_baseline_differs_from_itself_by_nothing(logits):
    figures = TokenFigures()
    for baseline, _, targets in zip(*logits, strict=True):
        distribution = Distribution.of(baseline)
        figures.add(distribution, distribution, targets)
    same = figures.quality("text", "fp32", TEXT_BYTES, WEIGHT_BYTES)
    differences = (same.log_ratio, same.divergence, same.delta_p, same.delta_p_rms)
    assert {number for each in differences for number in (each.value, each.error)} == {0.0}
    assert (same.divergence_maximum, same.same_top.value, same.same_top.error) == (0.0, 100.0, 0.0)


def test_large_logits_do_not_overflow():
    scores = Distribution.of(np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32) * 1000)
    assert np.allclose(np.exp(scores.logs).sum(-1), 1, rtol=1e-12)


def test_root_mean_square_of_zeros_has_no_error():
    assert root_mean_square(np.zeros(5)).error == 0
