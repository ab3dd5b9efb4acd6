"""Figures of quality, each with its standard error, as llama.cpp defines them.

The definitions are those of `llama-perplexity --kl-divergence` (`kl_divergence` in llama.cpp's
tools/perplexity/perplexity.cpp). It stores the baseline's log-probabilities in 16 bits and leaves tokens out whose
probability is below e^-16; here all numbers are float64 and no token is left out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

PERCENTILES = ("50", "90", "99", "99.9")  # of the KL divergence; the maximum is listed beside them
LEAST_TOKENS = 100  # as in llama.cpp: fewer are too few for statistics


@dataclass(frozen=True)
class Estimate:
    """A figure of a text, and its standard error as if tokens were independent."""

    value: float
    error: float


@dataclass(frozen=True)
class Quality:
    """How well one variant predicts one text. Differences are from the baseline, in nats or in percent."""

    text: str
    variant: str
    tokens: int  # predicted
    perplexity: Estimate
    log_ratio: Estimate  # ln(PPL / PPL of the baseline), paired token by token
    divergence: Estimate  # mean Kullback-Leibler divergence from the baseline, nats per token
    divergence_percentiles: Mapping[str, float]
    divergence_maximum: float
    delta_p: Estimate  # mean change in the probability of the token that came, in percent
    delta_p_rms: Estimate  # root mean square of that change, in percent
    same_top: Estimate  # share of positions with the same most likely token, in percent
    bits_per_byte: float
    weight_bytes: int


@dataclass(frozen=True)
class Distribution:
    """A distribution over the vocabulary for each row: natural logarithms of probabilities (rows, vocab), float64."""

    logs: Array

    @classmethod
    def of(cls, logits: NDArray[np.float32]) -> "Distribution":
        """The softmax of logits (rows, vocab)."""
        shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
        return cls(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))

    @cached_property
    def probabilities(self) -> Array:
        """The probabilities (rows, vocab); those of a baseline serve every variant."""
        return np.exp(self.logs)

    @cached_property
    def top(self) -> NDArray[np.int64]:
        """The most likely token of each row (rows,)."""
        return self.logs.argmax(-1)

    def divergence(self, other: "Distribution") -> Array:
        """The Kullback-Leibler divergence of `other` from this one in each row (rows,), in nats."""
        result: Array = np.einsum("rv,rv->r", self.probabilities, self.logs - other.logs)
        return result

    def log_of(self, tokens: NDArray[np.int64]) -> Array:
        """The logarithm of the probability of one token in each row (rows,)."""
        return self.logs[np.arange(len(tokens)), tokens]


@dataclass
class TokenFigures:
    """One variant's figures of each token of a text, gathered step by step; no distribution is kept."""

    logs: list[Array] = field(default_factory=list)  # logarithms of the probability of the token that came
    baseline_logs: list[Array] = field(default_factory=list)
    divergences: list[Array] = field(default_factory=list)
    same_tops: list[NDArray[np.bool_]] = field(default_factory=list)

    def add(self, found: Distribution, baseline: Distribution, targets: NDArray[np.int64]) -> None:
        """Add the tokens that came (rows,), as this variant and the baseline predicted them."""
        self.logs.append(found.log_of(targets))
        self.baseline_logs.append(baseline.log_of(targets))
        self.divergences.append(baseline.divergence(found))
        self.same_tops.append(found.top == baseline.top)

    def quality(self, text: str, variant: str, text_bytes: int, weight_bytes: int) -> Quality:
        """The figures of all tokens so far; `text_bytes` is the length of their text in UTF-8."""
        losses, base_losses = -np.concatenate(self.logs), -np.concatenate(self.baseline_logs)
        divergences, delta_p = np.concatenate(self.divergences), np.exp(-losses) - np.exp(-base_losses)
        return Quality(
            text=text,
            variant=variant,
            tokens=len(losses),
            perplexity=perplexity(losses),
            log_ratio=mean(losses - base_losses),
            divergence=mean(divergences),
            divergence_percentiles={name: float(np.percentile(divergences, float(name))) for name in PERCENTILES},
            divergence_maximum=float(divergences.max()),
            delta_p=percent(mean(delta_p)),
            delta_p_rms=percent(root_mean_square(delta_p)),
            same_top=percent(share(np.concatenate(self.same_tops))),
            bits_per_byte=float(losses.sum()) / math.log(2) / text_bytes,
            weight_bytes=weight_bytes,
        )


def mean(values: Array) -> Estimate:
    """The mean, and its standard error: sqrt((mean of squares - square of mean) / (n - 1)).

    Of the paired differences of two quantities this is llama.cpp's sqrt(a^2 + b^2 - 2 cov), a and b being the standard
    errors of the two and cov their covariance over n - 1.
    """
    return Estimate(float(values.mean()), math.sqrt(float(values.var()) / (len(values) - 1)))


def perplexity(losses: Array) -> Estimate:
    """exp of the mean loss; its error is that of the mean times the derivative, which is the perplexity itself."""
    loss = mean(losses)
    value = math.exp(loss.value)
    return Estimate(value, value * loss.error)


def root_mean_square(values: Array) -> Estimate:
    """sqrt of the mean square; its error is that of the mean square times the derivative, 1 / (2 sqrt)."""
    square = mean(values * values)
    value = math.sqrt(square.value)
    return Estimate(value, 0.5 * square.error / value if value else 0.0)


def share(values: NDArray[np.bool_]) -> Estimate:
    """The share that is true; its standard error is sqrt(p (1 - p) / (n - 1))."""
    return mean(values.astype(np.float64))


def percent(estimate: Estimate) -> Estimate:
    """The same figure in percent."""
    return Estimate(100 * estimate.value, 100 * estimate.error)
