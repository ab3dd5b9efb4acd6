"""8-bit floats (e4m3) in numpy alone, against torch and ml_dtypes."""

import ml_dtypes
import numpy as np

from runtime.gpu_check.float8 import from_e4m3, to_e4m3
from tests.helpers.float8_numbers import FINITE, hard_numbers, rounded


def test_rounding_is_that_of_torch():
    x = hard_numbers()
    x = x[~np.isnan(x)]
    assert np.array_equal(to_e4m3(x), rounded(x))


def test_every_number_is_read_exactly():
    assert np.array_equal(from_e4m3(FINITE), FINITE.view(ml_dtypes.float8_e4m3fn).astype(np.float64))
