"""Medians with quartiles."""

import numpy as np
import pytest

from runtime.benchmarks.spread import Spread


@pytest.mark.parametrize("samples", [[3.0], [1.0, 2.0], [5.0, 1.0, 4.0], [8.0, 1.0, 2.0, 9.0, 4.0]])
def test_quartiles_are_those_of_numpy(samples):
    found = Spread.of(samples)
    assert [found.low, found.median, found.high] == pytest.approx(np.quantile(samples, [0.25, 0.5, 0.75]).tolist())


def test_a_spread_is_written_as_its_median_and_quartiles():
    assert f"{Spread(1.0, 1.5, 2.25):.2f}" == "1.50 (1.00-2.25)"
