"""Weight storage, against the formula of symmetric rounding written another way, and against its own inverse."""

from fractions import Fraction

import numpy as np
import pytest

from export.quantize import SCHEMES, WeightStorage

ROUNDOFF = 2.0**-24


def random_matrix(n, k, seed=0):
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((n, k)) * generator.uniform(1e-3, 10, (n, 1))).astype(np.float32)


@pytest.fixture
def int8():
    return SCHEMES["int8"]


def test_int8_integers_are_the_formula_exactly(int8):
    """Python's own `round` (half to even) of each quotient in float32, the arithmetic that the scheme states."""
    matrix = random_matrix(7, 33)
    stored = int8.store("w", matrix, "float32")
    for row, quantized, scale in zip(matrix, stored["w"], stored["w_scale"], strict=True):
        assert scale == np.float32(max(abs(float(x)) for x in row)) / np.float32(127)
        assert quantized.tolist() == [round(float(np.float32(x / scale))) for x in row]
    assert (stored["w"].dtype, stored["w_scale"].dtype) == (np.int8, np.float32)


def test_int8_rounds_half_to_even(int8):
    """A scale of exactly 2: 1 3 5 7 lie half-way between integers."""
    stored = int8.store("w", np.array([[254, 1, 3, 5, 7, -1, -3, -5]], np.float32), "float32")
    assert stored["w_scale"].tolist() == [2]
    assert stored["w"].tolist() == [[127, 0, 2, 2, 4, 0, -2, -2]]


@pytest.mark.parametrize("seed", range(5))
def test_int8_error_is_at_most_half_a_scale(int8, seed):
    """scale / 2, and what float32 rounds: the quotient (at most 127) and the product each move by 127 scale u."""
    matrix = random_matrix(31, 65, seed)
    stored = int8.store("w", matrix, "float32")
    exact = stored["w"].astype(np.float64) * stored["w_scale"].astype(np.float64)[:, None]
    half = stored["w_scale"][:, None] * (0.5 + 127 * ROUNDOFF)
    assert (np.abs(exact - matrix) <= half).all()
    assert np.abs(stored["w"]).max(axis=1).tolist() == [127] * 31  # each row uses the whole range, and -128 is never there


def test_int8_row_of_zeros(int8):
    stored = int8.store("w", np.array([[0, 0], [1, -1]], np.float32), "float32")
    assert stored["w"].tolist() == [[0, 0], [127, -127]]
    assert stored["w_scale"][0] == 1
    assert int8.load("w", stored)[0].tolist() == [0, 0]


def test_int8_load_is_the_product_exactly(int8):
    stored = int8.store("w", random_matrix(5, 9), "float32")
    loaded = int8.load("w", stored)
    for n in range(5):
        for k in range(9):
            exact = Fraction(int(stored["w"][n, k])) * Fraction(float(stored["w_scale"][n]))
            assert loaded[n, k] == np.float32(float(exact))  # 7 bits times 24 fit a double, so this rounds once


def test_int8_stores_again_what_it_loaded(int8):
    """Storing loaded weights changes no integer: each is within a few u of a whole number of scales."""
    first = int8.store("w", random_matrix(16, 40), "float32")
    second = int8.store("w", int8.load("w", first), "float32")
    assert np.array_equal(first["w"], second["w"])


def test_float16_storage():
    matrix = random_matrix(4, 6)
    stored = SCHEMES["none"].store("w", matrix, "float16")
    assert stored["w"].dtype == np.float16
    assert np.array_equal(stored["w"], matrix.astype(np.float16))
    assert np.array_equal(SCHEMES["none"].load("w", stored), matrix.astype(np.float16).astype(np.float32))


def test_float32_storage_changes_nothing():
    matrix = random_matrix(4, 6)
    assert np.array_equal(SCHEMES["none"].load("w", SCHEMES["none"].store("w", matrix, "float32")), matrix)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["tok_embeddings.weight", "output.weight", "layers.0.attention.wqkv.weight", "norm.weight"])
def test_specs_promise_what_store_gives(scheme, dtype, tied, name):
    storage = WeightStorage(scheme, dtype, tied)
    weight = random_matrix(6, 8) if name != "norm.weight" else random_matrix(1, 8)[0]
    stored = storage.store(name, weight)
    specs = storage.specs(name, weight.shape)
    assert [(s.name, s.shape, s.dtype) for s in specs] == [(n, a.shape, str(a.dtype)) for n, a in stored.items()]
    assert storage.load(name, weight.ndim, stored).dtype == np.float32


def test_what_int8_leaves_alone():
    """Norms stay float32; an embedding that is not the head as well keeps the dtype."""
    storage = WeightStorage("int8", "float16", tied_embeddings=False)
    assert storage.specs("norm.weight", (8,))[0].dtype == "float32"
    assert [spec.dtype for spec in storage.specs("tok_embeddings.weight", (6, 8))] == ["float16"]
    assert [spec.dtype for spec in storage.specs("output.weight", (6, 8))] == ["int8", "float32"]
    tied = WeightStorage("int8", "float16", tied_embeddings=True)
    assert [spec.dtype for spec in tied.specs("tok_embeddings.weight", (6, 8))] == ["int8", "float32"]
