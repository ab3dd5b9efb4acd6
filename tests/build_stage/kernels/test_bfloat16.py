"""Products of bfloat16 with activations that are rounded to it, against float64 of the rounded activations.

Rounded activations are known exactly, so that only float32 sums err: by at most (K + 1) u sum |x w| in any order
(Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1).
"""

import ml_dtypes
import numpy as np
import pytest

from build.kernels.cpu.level import LEVELS
from build.kernels.cpu.linear import linear
from build.kernels.cpu.mixture import mixture
from build.kernels.shapes import Linear
from export.weights.format import ModelTensor, Storage
from export.weights.panels import to_pair_panels
from export.weights.table import store
from tests.build_stage.kernels.test_cpu import called
from tests.helpers.cpu_products import call, output, processor_of, skip_unless_runnable
from tests.helpers.kernels import PROCESSORS, compiled, machine_code, packed
from tests.helpers.mixture_reference import check as check_mixture

U = 2.0**-24
ROUNDED = Storage(dtype="bfloat16", rounding="bfloat16")
BY_NAME = {level.name: level for level in LEVELS}
WAYS = ("amx", "avx512-bf16", "avx512", "avx2")  # in which levels multiply
# rows, N, K: one row, few and many; N is near a panel; K is odd, prime, below and beyond a tile's 32 steps, and whole
SIZES = [(1, 31, 33), (7, 45, 331), (2, 1, 1), (40, 64, 192), (100, 65, 40)]
KNOWN = {  # float32 bits to bfloat16 bits: halves go to even; a carry reaches the exponent; infinity and NaN stay
    0x3F808000: 0x3F80,
    0x3F818000: 0x3F82,
    0x3F808001: 0x3F81,
    0x3FFFFFFF: 0x4000,
    0xBF818000: 0xBF82,
    0x7F800000: 0x7F80,
    0x7F800001: 0x7FC0,
}


@pytest.fixture(params=WAYS)
def level(request):
    """A level that this machine can run."""
    skip_unless_runnable(BY_NAME[request.param])
    return BY_NAME[request.param]


def rounded(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def random_arguments(rows, n, k):
    """x, the packed weight, and the weight in float64."""
    generator = np.random.default_rng(k)
    tensor = ModelTensor(name="w", shape=(n, k), stored=ROUNDED)
    stored = store(tensor, generator.standard_normal((n, k)).astype(np.float32))
    x = generator.standard_normal((1, rows, k)).astype(np.float32)
    return x, packed(tensor, stored, "llvm")[0], stored["w"].astype(np.float64)


def product(level, x, weight, n):
    rows, k = x.shape[1:]
    y = output(1, rows, n)
    call(compiled(linear(level, Linear((1, rows), n, k, ROUNDED)), processor_of(level)), x, weight, y)
    return y


@pytest.mark.parametrize(("rows", "n", "k"), SIZES)
def test_product_and_its_rows(level, rows, n, k):
    """The sums are those of rounded activations, and each row has the bits that it has alone."""
    x, weight, wide = random_arguments(rows, n, k)
    y = product(level, x, weight, n)
    exact, size = rounded(x) @ wide.T, np.abs(rounded(x)) @ np.abs(wide).T
    assert (np.abs(y - exact) <= (k + 1) * U * size).all()
    for row in {0, rows // 2, rows - 1}:
        alone = product(level, x[:, row : row + 1], weight, n)
        assert np.array_equal(alone.view(np.uint32), y[:, row : row + 1].view(np.uint32))


def test_rounding_is_half_to_even(level):
    """By one output, to which each number comes alone, times one."""
    x = np.array(list(KNOWN), np.uint32).view(np.float32).reshape(1, -1, 1)
    _, weight, _ = random_arguments(1, 1, 1)
    weight[...] = 0
    weight[0, 0, 0, 0] = 0x3F80
    found, expected = (product(level, x, weight, 1).ravel(), np.array(list(KNOWN.values()), np.uint32) << 16)
    assert np.array_equal(found, expected.view(np.float32), equal_nan=True)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize(("name", "instruction"), [("amx", "tdpbf16ps"), ("avx512-bf16", "vdpbf16ps")])
def test_levels_multiply_with_their_own_instruction(name, instruction, rows):
    """In loops that keep their sums in registers: no product has one on the stack."""
    code = machine_code(linear(BY_NAME[name], Linear((1, rows), 64, 512, ROUNDED)), PROCESSORS[name])
    products = [line for line in code.splitlines() if instruction in line]
    assert products
    assert not [line for line in products if "rsp" in line]
    assert code.count("tilerelease") == code.count("ldtilecfg") == int(name == "amx")


@pytest.mark.parametrize(("tokens", "dim", "hidden_dim"), [(1, 34, 7), (5, 40, 33)])
def test_mixture(tokens, dim, hidden_dim):
    """Experts take activations as they are; the odd width leaves half a pair."""
    check_mixture(
        lambda shape, arrays: called(mixture(BY_NAME["avx2"], shape), arrays),
        tokens, dim, hidden_dim, "bfloat16", lambda matrix: to_pair_panels(matrix.view(np.uint16)),
    )  # fmt: skip
