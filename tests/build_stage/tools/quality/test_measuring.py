"""What the models are fed, and which of their predictions count."""

import numpy as np
import pytest

from build.tools.quality.figures import Distribution
from build.tools.quality.measuring import Contestant, measure
from build.tools.quality.texts import Passages

VOCAB = 11


class Recorder:
    """A model whose logits follow from all that it has been fed since it was emptied."""

    def __init__(self, batch, noise=0.0):
        self.batch, self.noise = batch, noise
        self.reset()

    def reset(self):
        self.fed = [[] for _ in range(self.batch)]

    def prefill(self, prompts):
        for fed, prompt in zip(self.fed, prompts, strict=True):
            fed += prompt
        return np.stack([logits_after(fed, self.noise) for fed in self.fed])


def logits_after(ids, noise):
    exact = np.random.default_rng(ids).standard_normal(VOCAB)
    return (exact + noise * np.random.default_rng([99, *ids]).standard_normal(VOCAB)).astype(np.float32)


@pytest.mark.parametrize(("unscored", "length"), [(0, 9), (4, 9), (4, 8)])
def test_each_scored_token_is_predicted_from_all_before_it(unscored, length):
    """Five passages are read by two rows: the last group is filled up, and the filling does not count."""
    ids = np.random.default_rng(1).integers(VOCAB, size=(5, length))
    passages = Passages(ids, unscored, scored_bytes=40)
    advanced = []
    contestants = {"fp32": Contestant(Recorder(2), 400), "int8": Contestant(Recorder(2, 0.1), 100)}
    baseline, other = measure(contestants, "text", passages, advanced.append)

    pairs = [(ids[row, :end], ids[row, end]) for row in range(5) for end in range(unscored + 1, length)]
    losses = [-Distribution.of(logits_after(before, 0.0)[None]).log_of(np.array([came]))[0] for before, came in pairs]
    divergences = [
        Distribution.of(logits_after(before, 0.0)[None]).divergence(Distribution.of(logits_after(before, 0.1)[None]))[0]
        for before, _ in pairs
    ]
    assert passages.scored == baseline.tokens == other.tokens == len(pairs) == sum(advanced)
    assert baseline.perplexity.value == pytest.approx(np.exp(np.mean(losses)), rel=1e-12)
    assert other.divergence.value == pytest.approx(np.mean(divergences), rel=1e-12)
    assert other.divergence_maximum == pytest.approx(np.max(divergences), rel=1e-12)
    assert (baseline.variant, other.variant, other.weight_bytes) == ("fp32", "int8", 100)
