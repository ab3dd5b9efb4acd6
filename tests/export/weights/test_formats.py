"""Weight storage, against the formula for symmetric rounding written in another way, and against its own inverse."""

from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
import torch

from export.configuration.config import schemes_of
from export.weights.format import ModelTensor, Storage
from export.weights.int4 import unpacked
from export.weights.rules import StorageRules
from export.weights.table import FORMATS, STORAGE_DTYPES, carry, load, specs, store
from export.weights.widening import Stored as StoredInput
from runtime.artifact.manifest import Quantization
from runtime.artifact.schemes import SCHEMES, SchemeName
from runtime.artifact.targets import TARGETS
from tests.helpers.encoded import rows_for

ROUNDOFF = 2.0**-24


def random_matrix(n, k, seed=0):
    generator = np.random.default_rng(seed)
    return (generator.standard_normal((n, k)) * generator.uniform(1e-3, 10, (n, 1))).astype(np.float32)


class Stored:
    """One format, with its functions for a matrix named w."""

    def __init__(self, **fields):
        self.format = Storage(**fields)

    def tensor(self, shape):
        return ModelTensor(name="w", shape=shape, stored=self.format)

    def store(self, matrix):
        return store(self.tensor(matrix.shape), matrix)

    def load(self, shape, stored):
        return load(self.tensor(shape), stored)


@pytest.fixture
def int8():
    return Stored(dtype="int8")


def test_int8_integers_are_the_formula_exactly(int8):
    """Python's own `round` (half to even) of each quotient in float32, the arithmetic that the scheme states."""
    matrix = random_matrix(7, 33)
    stored = int8.store(matrix)
    for row, quantized, scale in zip(matrix, stored["w"], stored["w_scale"], strict=True):
        assert scale == np.float32(max(abs(float(x)) for x in row)) / np.float32(127)
        assert quantized.tolist() == [round(float(np.float32(x / scale))) for x in row]
    assert (stored["w"].dtype, stored["w_scale"].dtype) == (np.int8, np.float32)


def test_int8_rounds_half_to_even(int8):
    """With a scale of exactly 2, the numbers 1 3 5 7 lie half-way between integers."""
    stored = int8.store(np.array([[254, 1, 3, 5, 7, -1, -3, -5]], np.float32))
    assert stored["w_scale"].tolist() == [2]
    assert stored["w"].tolist() == [[127, 0, 2, 2, 4, 0, -2, -2]]


@pytest.mark.parametrize("seed", range(5))
def test_int8_error_is_at_most_half_a_scale(int8, seed):
    """scale / 2, plus the rounding of float32: the quotient (at most 127) and the product each move by 127 scale u."""
    matrix = random_matrix(31, 65, seed)
    stored = int8.store(matrix)
    exact = stored["w"].astype(np.float64) * stored["w_scale"].astype(np.float64)[:, None]
    half = stored["w_scale"][:, None] * (0.5 + 127 * ROUNDOFF)
    assert (np.abs(exact - matrix) <= half).all()
    # each row uses the whole range, and -128 never occurs
    assert np.abs(stored["w"]).max(axis=1).tolist() == [127] * 31


def test_int8_row_of_zeros(int8):
    stored = int8.store(np.array([[0, 0], [1, -1]], np.float32))
    assert stored["w"].tolist() == [[0, 0], [127, -127]]
    assert stored["w_scale"][0] == 1
    assert int8.load((2, 2), stored)[0].tolist() == [0, 0]


def test_int8_load_is_the_product_exactly(int8):
    stored = int8.store(random_matrix(5, 9))
    loaded = int8.load((5, 9), stored)
    for n in range(5):
        for k in range(9):
            exact = Fraction(int(stored["w"][n, k])) * Fraction(float(stored["w_scale"][n]))
            assert loaded[n, k] == np.float32(float(exact))  # 7 bits times 24 bits fit in a double, so this rounds once


def test_int8_stores_again_what_it_loaded(int8):
    """Storing loaded weights changes no integer: each is within a few u of a whole number of scales."""
    first = int8.store(random_matrix(16, 40))
    second = int8.store(int8.load((16, 40), first))
    assert np.array_equal(first["w"], second["w"])


def test_float8_numbers_are_those_of_torch():
    """Of each quotient in float32; torch rounds to the nearest, half to even."""
    matrix = random_matrix(9, 70)
    matrix[0] = np.linspace(-448, 448, 70)  # a scale of exactly 1
    matrix[0, :5] = [2**-9, 2**-10, 3 * 2**-10, 17, 19]  # the least number, and some that lie half-way between two
    stored = Stored(dtype="float8").store(matrix)
    assert stored["w_scale"].tolist() == [np.float32(np.abs(row).max()) / np.float32(448) for row in matrix]
    quotients = torch.from_numpy(matrix / stored["w_scale"][:, None])
    assert np.array_equal(stored["w"], quotients.to(torch.float8_e4m3fn).view(torch.uint8).numpy())


@pytest.mark.parametrize("seed", range(3))
def test_float8_error_is_at_most_half_a_unit(seed):
    """2**-4 of a number, since four bits count, or half of the least number times the scale; u for the quotient."""
    matrix = random_matrix(31, 65, seed)
    matrix[0], matrix[1] = 0, np.linspace(-1e-44, 1e-44, 65)  # zeros, and numbers so small that a scale is inexact
    float8 = Stored(dtype="float8")
    stored = float8.store(matrix)
    half = np.maximum(np.abs(matrix) * 2.0**-4, stored["w_scale"][:, None] * 2.0**-10)
    error = np.abs(float8.load(matrix.shape, stored).astype(np.float64) - matrix)
    assert (error[2:] <= half[2:] + 2 * ROUNDOFF * np.abs(matrix[2:])).all()
    assert (error[:2] <= 1e-44).all()


@pytest.mark.parametrize(("dtype", "bits"), [("float16", 11), ("bfloat16", 8)])
def test_narrower_floats(dtype, bits):
    """Rounding is to nearest: off by at most half a unit in the last of `bits` bits."""
    matrix = random_matrix(4, 6)
    stored = Stored(dtype=dtype).store(matrix)
    assert str(stored["w"].dtype) == dtype
    loaded = Stored(dtype=dtype).load(matrix.shape, stored)
    assert (np.abs(loaded - matrix) <= 2.0**-bits * np.abs(matrix)).all()


def test_float32_storage_changes_nothing():
    matrix = random_matrix(4, 6)
    assert np.array_equal(Stored(dtype="float32").load((4, 6), Stored(dtype="float32").store(matrix)), matrix)


INT4 = {"symmetric": {"group_size": 32}, "zero points": {"group_size": 32, "offsets": "zero_points"}}


@pytest.mark.parametrize("name", INT4)
@pytest.mark.parametrize("shape", [(5, 64), (3, 40), (1, 8)])
def test_int4_is_read_back_by_its_definition(name, shape):
    """(q - zero) scale, number by number, in groups of 32, the last one shorter.

    The numbers q go from 0 to 15, two in a byte, the first in the low half.
    """
    int4 = Stored(dtype="int4", **INT4[name])
    stored = int4.store(random_matrix(*shape))
    loaded = int4.load(shape, stored)
    numbers = unpacked(int4.tensor(shape).stored, stored["w"])
    for row in range(shape[0]):
        for k in range(shape[1]):
            byte = int(stored["w"][row, k // 2])
            nibble = byte & 15 if k % 2 == 0 else byte >> 4
            q = nibble if int4.format.zero_points else (nibble + 8) % 16  # two's complement without zero points
            assert q == numbers[row, k]
            zero = int(stored["w_zero_point"][row, k // 32]) if int4.format.zero_points else 8
            assert loaded[row, k] == np.float32(q - zero) * np.float32(stored["w_scale"][row, k // 32])


@pytest.mark.parametrize("name", INT4)
def test_int4_minimises_the_error_of_each_group(name):
    """No worse than the plain choice, and better by a twentieth over many groups.

    The plain choice puts the largest number at the end of the range.
    """
    matrix = np.random.default_rng(0).standard_normal((64, 256)).astype(np.float32)
    int4 = Stored(dtype="int4", **INT4[name])
    found = np.square(int4.load(matrix.shape, int4.store(matrix)) - matrix).reshape(64, 8, 32).sum(-1)
    plain = np.square(plain_int4(matrix, zero_points=int4.format.zero_points) - matrix).reshape(64, 8, 32).sum(-1)
    assert (found <= plain * (1 + 1e-3)).all()  # scales are rounded to float16
    assert found.sum() < 0.95 * plain.sum()


def plain_int4(matrix, *, zero_points):
    """Round to nearest over the whole range of each group."""
    groups = matrix.reshape(len(matrix), -1, 32).astype(np.float64)
    if zero_points:
        low, high = np.minimum(groups.min(-1, keepdims=True), 0), np.maximum(groups.max(-1, keepdims=True), 0)
        scale = ((high - low) / 15).astype(np.float16).astype(np.float64)
        zero = np.rint(-low / scale)
        return ((np.clip(np.rint(groups / scale) + zero, 0, 15) - zero) * scale).reshape(matrix.shape)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)
    scale = (largest / -8).astype(np.float16).astype(np.float64)
    return (np.clip(np.rint(groups / scale), -8, 7) * scale).reshape(matrix.shape)


@pytest.mark.parametrize("name", INT4)
def test_int4_of_zeros_and_of_tiny_numbers(name):
    int4 = Stored(dtype="int4", **INT4[name])
    for matrix in (np.zeros((2, 32), np.float32), np.full((2, 32), 1e-30, np.float32)):
        stored = int4.store(matrix)
        assert (np.abs(stored["w_scale"]) > 0).all()
        assert (int4.load((2, 32), stored) == 0).all()


@pytest.mark.parametrize("name", INT4)
def test_rows_can_be_stored_a_few_at_a_time(name):
    int4 = Stored(dtype="int4", **INT4[name])
    matrix = random_matrix(7, 48)
    whole, parts = int4.store(matrix), [int4.store(rows) for rows in (matrix[:2], matrix[2:])]
    assert all(np.array_equal(whole[key], np.concatenate([part[key] for part in parts])) for key in whole)


NAMES = [
    "tok_embeddings.weight",
    "output.weight",
    "layers.0.attention.wqkv.weight",
    "layers.1.feed_forward.w2.weight",
    "norm.weight",
]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_specs_promise_what_store_gives(scheme, dtype, tied):
    rules = StorageRules(Quantization(scheme=scheme), dtype, tied, n_layers=2)
    for name in NAMES:
        tensor = rules.tensor(name, (8,) if name == "norm.weight" else (6, 8))
        stored = store(tensor, np.ones(tensor.shape, np.float32))
        assert [(s.name, s.shape, s.dtype) for s in specs(tensor)] == [
            (n, a.shape, str(a.dtype)) for n, a in stored.items()
        ]
        assert load(tensor, stored).dtype == np.float32


def formats(*, tied=False, dtype="float16", k=8, **quantization):
    rules = StorageRules(Quantization(**quantization), dtype, tied, n_layers=2)
    return {name: rules.tensor(name, (8,) if name == "norm.weight" else (6, k)).stored for name in NAMES}


def test_what_schemes_leave_alone():
    """Norms stay float32; an embedding that is not also the head keeps the dtype."""
    assert [f.dtype for f in formats(scheme="int8").values()] == ["float16", "int8", "int8", "int8", "float32"]
    assert formats(scheme="int8", tied=True)["tok_embeddings.weight"].dtype == "int8"


def test_kept_parts_take_the_wider_scheme():
    kept = formats(scheme="int4_dynamic", keep=("head", "last"), keep_scheme="int8")
    assert {name: (f.dtype, f.rounds) for name, f in kept.items()} == {
        "tok_embeddings.weight": ("float16", False),
        "output.weight": ("int8", False),
        "layers.0.attention.wqkv.weight": ("int4", True),
        "layers.1.feed_forward.w2.weight": ("int8", False),
        "norm.weight": ("float32", False),
    }
    assert (
        formats(scheme="int4", keep=("first",), keep_scheme="none")["layers.0.attention.wqkv.weight"].dtype == "float16"
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", ["int8_dynamic", "bf16_dot"])
def test_a_head_takes_tokens_as_they_are(scheme, tied):
    found = formats(scheme=scheme, tied=tied)
    assert not found["tok_embeddings.weight" if tied else "output.weight"].rounds
    assert found["layers.0.attention.wqkv.weight"].rounds


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_of_4_bits_has_a_head_of_8_unless_it_is_kept(tied):
    head = "tok_embeddings.weight" if tied else "output.weight"
    assert formats(scheme="int4_dynamic", tied=tied)[head] == Storage(dtype="int8")
    kept = formats(scheme="int4", tied=tied, keep=("head",), keep_scheme="int4")
    assert kept[head] == Storage(dtype="int4", group_size=32)


def test_what_int4_cannot_hold_is_int8():
    """Eight numbers share a word, and the kernels of experts read whole numbers."""
    assert formats(scheme="int4", k=12)["output.weight"].dtype == "int8"
    rules = StorageRules(Quantization(scheme="int4_dynamic"), "float32", tied_embeddings=False, n_layers=1)
    assert rules.tensor("layers.0.feed_forward.experts.w13.weight", (64, 32)).stored == Storage(dtype="int8")


def test_experts_in_bfloat16_take_tokens_as_they_are():
    rules = StorageRules(Quantization(scheme="bf16_dot"), "float32", tied_embeddings=False, n_layers=1)
    assert rules.tensor("layers.0.feed_forward.experts.w13.weight", (64, 32)).stored == Storage(dtype="bfloat16")


STORAGES = {
    "float32": Storage(dtype="float32"),
    "float16": Storage(dtype="float16"),
    "bfloat16": Storage(dtype="bfloat16", rounding="bfloat16"),
    "int8": Storage(dtype="int8"),
    "int8 groups": Storage(dtype="int8", group_size=16, scales="float32"),
    "int8 zero points": Storage(dtype="int8", group_size=32, offsets="zero_points", rounding="int8"),
    "int8 minimums": Storage(dtype="int8", group_size=256, offsets="minimums"),
    "int4": Storage(dtype="int4", group_size=32),
    "int4 zero points": Storage(dtype="int4", group_size=32, offsets="zero_points"),
    "int4 minimums": Storage(dtype="int4", group_size=64, offsets="minimums", scales="float32"),
    "int4 reordered": Storage(dtype="int4", group_size=32, reordered=True),
    "float8": Storage(dtype="float8"),
    "float8 groups": Storage(dtype="float8", group_size=128, scales="float32"),
}


def test_every_format_is_tried():
    assert {stored.dtype for stored in STORAGES.values()} == set(FORMATS)


@pytest.mark.parametrize("name", STORAGES)
def test_every_format_tells_the_truth_about_itself(name):
    """A format is as it describes itself.

    Its stored tensors are those that it names; graphs read each of them once; every layout holds what it says; K is a
    multiple of what it asks for.
    """
    stored_as, k = STORAGES[name], 64
    form = FORMATS[stored_as.dtype]
    tensor = ModelTensor(name="w", shape=(40, k), stored=stored_as)
    stored = carry(tensor, rows_for(stored_as, 40, k)) if form.scaled else store(tensor, random_matrix(40, k))
    described = {spec.name: (spec.shape, spec.dtype) for spec in form.specs(tensor)}
    assert {part: (array.shape, str(array.dtype)) for part, array in stored.items()} == described
    assert next(iter(described)) == "w"
    widening = form.widening(tensor)
    steps = [] if widening is None else widening.steps
    read = ["w" + given.suffix for step in steps for given in step.inputs if isinstance(given, StoredInput)] or ["w"]
    assert sorted([*read, *(["w_order"] if stored_as.reordered else [])]) == sorted(described)
    assert k % form.multiple == 0
    assert form.scaled == (len(described) > 1)
    for packing in form.packings.values():
        layout = packing.layout(tensor.stored, *tensor.shape)
        packed = packing.pack(tensor.stored, stored["w"], 1)
        assert (packed.shape, str(packed.dtype)) == (layout.shape, layout.dtype)
        assert (layout.scales is not None) == form.scaled
        assert (layout.offsets is not None) == (stored_as.offsets != "none")
        assert (layout.order is not None) == stored_as.reordered


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_gets_the_schemes_that_its_kernels_read(target):
    """A target has no scheme whose format lacks a layout for it.

    No scheme rounds activations where the kernels do not.
    """
    row, found = TARGETS[target], schemes_of(target)
    assert "none" in found
    for name, scheme in SCHEMES.items():
        if name in found and scheme.format is not None:
            assert row.layout in FORMATS[scheme.format].packings
        if scheme.rounding != "none" and not row.rounds_activations:
            assert name not in found
    assert all(row.layout in FORMATS[STORAGE_DTYPES[dtype]].packings for dtype in row.dtypes)


def test_schemes_say_what_their_formats_are():
    """The runtime, which knows no formats, learns from the scheme whether scales belong to groups."""
    assert set(SCHEMES) == set(get_args(SchemeName))
    for scheme in SCHEMES.values():
        assert scheme.grouped == (scheme.format == "int4")
        assert scheme.rounding == "none" or scheme.carries or scheme.rounding in FORMATS[scheme.format].roundings
