"""Every CPU kernel against numpy in float64, at shapes that divide by nothing.

Bounds follow from float32 alone: any order of summing K products, fused or not, is off by at most (K + 1) u sum |x w|, with u = 2**-24
(Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1).
"""

from dataclasses import dataclass

import numpy as np
import pytest
import tvm_ffi

from build.compiler import tvm
from build.kernels.cpu import vector
from build.kernels.cpu.attention import rolling_attention
from build.kernels.cpu.embedding import embedding
from build.kernels.cpu.linear import PANEL, linear
from build.kernels.cpu.mixture import mixture
from build.kernels.cpu.norm import rms_norm
from build.kernels.cpu.swiglu import swiglu
from build.kernels.shapes import Mixture, RollingAttention
from build.pack import to_panels
from tests.mixture_reference import check as check_mixture

U = 2.0**-24
EXP_ULPS = 2  # of `vector.exp`; test_exp measures it
ALIGNMENT = 64
TARGET = tvm.target.Target({"kind": "llvm", "mcpu": "x86-64-v3"})


def compiled(function):
    return tvm.compile(tvm.IRModule({"kernel": function.with_attr("global_symbol", "kernel")}), target=TARGET)["kernel"]


def aligned(array):
    """A copy that begins where generated code assumes it to."""
    buffer = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % ALIGNMENT
    copy = buffer[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def call(kernel, *arrays):
    """Arrays changed in place must be `aligned` by the caller; the others are copied."""
    kernel(*(tvm_ffi.from_dlpack(array if array.ctypes.data % ALIGNMENT == 0 else aligned(array)) for array in arrays))


def output(*shape):
    """Filled with NaN, so that an element that is never written shows."""
    return aligned(np.full(shape, np.nan, np.float32))


def random_weight(generator, n, k, dtype):
    return generator.integers(-127, 128, (n, k)).astype(dtype) if dtype == "int8" else generator.standard_normal((n, k)).astype(dtype)


LINEAR = [
    # rows, N, K: N below, at, beside and beyond one panel; K odd, prime and with a factor that fits the tile
    (1, 1, 1, "float32"),
    (1, 31, 33, "float32"),
    (1, 64, 50, "float16"),
    (1, 100, 33, "int8"),
    (1, 33, 130, "int8"),
    (2, 33, 65, "float32"),
    (2, 5, 7, "int8"),
    (5, 32, 127, "float16"),
    (5, 70, 50, "int8"),
    (7, 45, 131, "float32"),
    (16, 97, 256, "int8"),
    (16, 31, 12, "float16"),
    (128, 65, 130, "float32"),
    (128, 33, 77, "int8"),
]


@pytest.mark.parametrize(("rows", "n", "k", "dtype"), LINEAR)
def test_linear(rows, n, k, dtype):
    generator = np.random.default_rng(0)
    scaled = dtype == "int8"
    weight = random_weight(generator, n, k, dtype)
    x = generator.standard_normal((1, rows, k)).astype(np.float32)
    scale = generator.uniform(1e-3, 1, n).astype(np.float32) if scaled else np.ones(n, np.float32)
    y = output(1, rows, n)
    call(compiled(linear((1, rows), n, k, dtype, scaled)), x, to_panels(weight, PANEL), *([scale] if scaled else []), y)
    exact = (x.astype(np.float64) @ weight.astype(np.float64).T) * scale
    size = (np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T) * scale
    assert (np.abs(y - exact) <= (k + 2) * U * size).all()  # one rounding more for the scale


def test_linear_of_two_batch_rows_and_three_tokens():
    """The leading dimensions are flattened, in order."""
    generator = np.random.default_rng(1)
    x, weight = generator.standard_normal((2, 3, 9)).astype(np.float32), random_weight(generator, 40, 9, "float32")
    y = output(2, 3, 40)
    call(compiled(linear((2, 3), 40, 9, "float32", False)), x, to_panels(weight, PANEL), y)
    size = np.abs(x).astype(np.float64) @ np.abs(weight).astype(np.float64).T
    assert (np.abs(y - x.astype(np.float64) @ weight.astype(np.float64).T) <= 10 * U * size).all()


def test_linear_never_reads_the_padding_of_the_last_panel():
    """Whatever lies behind the last output changes nothing."""
    generator = np.random.default_rng(2)
    x = generator.standard_normal((1, 3, 8)).astype(np.float32)
    packed = to_panels(random_weight(generator, 35, 8, "float32"), PANEL)
    kernel = compiled(linear((1, 3), 35, 8, "float32", False))
    clean, dirty = output(1, 3, 35), output(1, 3, 35)
    call(kernel, x, packed, clean)
    packed[-1, :, 3:] = np.nan
    call(kernel, x, packed, dirty)
    assert np.array_equal(clean, dirty)


@pytest.mark.parametrize(("n", "k", "dtype"), [(33, 7, "float32"), (40, 20, "float16"), (301, 13, "int8")])
def test_embedding(n, k, dtype):
    """A gather and at most one product: exact, the last row of the last panel included."""
    generator = np.random.default_rng(0)
    weight = random_weight(generator, n, k, dtype)
    scale = generator.uniform(1e-3, 1, n).astype(np.float32)
    ids = np.array([[0, n - 1, 1], [31, 32, n - 2]], np.int64)
    y = output(2, 3, k)
    scaled = dtype == "int8"
    call(compiled(embedding((2, 3), n, k, dtype, scaled)), ids, to_panels(weight, PANEL), *([scale] if scaled else []), y)
    expected = weight[ids].astype(np.float32) * (scale[ids][..., None] if scaled else np.float32(1))
    assert np.array_equal(y, expected)


@pytest.mark.parametrize(("lead", "dim"), [((1, 1), 64), ((1, 1), 7), ((2, 3), 20), ((1, 16), 33), ((1, 2), 2)])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_rms_norm(lead, dim, eps):
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((*lead, dim)) * generator.choice([1e-3, 1, 1e15], (*lead, 1))).astype(np.float32)
    x[0, 0] = 0 if lead == (2, 3) else x[0, 0]  # a row of zeros stays zero
    weight = generator.standard_normal(dim).astype(np.float32)
    y = output(*lead, dim)
    call(compiled(rms_norm(lead, dim, eps)), x, weight, y)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(eps)) * weight
    # dim + 1 roundings of the sum count half behind the root; then the mean, eps, root, inverse and two products: 6 more.
    assert (np.abs(y - exact) <= ((dim + 1) / 2 + 6) * U * np.abs(exact)).all()


@pytest.mark.parametrize(("lead", "hidden"), [((1, 1), 96), ((1, 1), 45), ((2, 3), 90), ((1, 16), 7)])
def test_swiglu(lead, hidden):
    generator = np.random.default_rng(0)
    gate = generator.choice([-1e4, -200, -90, -88, -20, -1, -1e-6, 0, 1e-6, 1, 20, 88, 90, 200, 1e4], (*lead, hidden))
    gate = (gate * generator.uniform(0.9, 1.1, gate.shape)).astype(np.float32)
    up = generator.standard_normal(gate.shape).astype(np.float32)
    y = output(*lead, hidden)
    call(compiled(swiglu(lead, hidden)), np.concatenate([gate, up], -1), y)
    wide = gate.astype(np.float64)
    exact = wide / (1 + np.exp(np.minimum(-wide, 700))) * up
    # exp, sum, quotient and product each round; where exp is clamped (gate < -88.37), gate / exp(88.37) is all that is left of either side.
    bound = (2 * EXP_ULPS + 4) * U * np.abs(exact) + np.where(gate < -88, 2 * np.abs(wide * up) * np.exp(-vector.LARGEST), 0)
    assert (np.abs(y - exact) <= bound).all()


@pytest.fixture(scope="module")
def exp_kernel():
    from tvm.script import tirx as T

    @T.prim_func
    def kernel(x: T.Buffer((4096,), "float32"), y: T.Buffer((4096,), "float32")):
        T.func_attr({"tirx.noalias": True})
        for i in T.serial(4096 // vector.LANES):
            for v in T.vectorized(vector.LANES):
                y[i * vector.LANES + v] = vector.exp(x[i * vector.LANES + v])

    return compiled(kernel)


def exp_of(kernel, values):
    x = np.resize(np.asarray(values, np.float32), (-(-len(values) // 4096), 4096))
    y = output(*x.shape)
    for row in range(len(x)):
        call(kernel, x[row], y[row])
    return y.ravel()[: len(values)].copy()


def test_exp(exp_kernel):
    """Over the whole range, 2 ulp: Cephes states 1.7e-7 = 1.4 ulp of relative error for this polynomial, and the last product rounds once more."""
    x = np.linspace(vector.SMALLEST, vector.LARGEST, 4096 * 40).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exp_of(exp_kernel, x) - exact) <= EXP_ULPS * 2 * U * exact).all()


def test_exp_at_its_ends(exp_kernel):
    x = [0, -0.0, -1e30, -3e38, -88, -87.33, 88.37, 100, 1e30]
    found = exp_of(exp_kernel, x)
    assert found[:2].tolist() == [1, 1]
    assert np.isfinite(found).all()
    assert (found[2:6] <= 2.0**-125).all()  # next to nothing, and never negative
    assert (found[2:6] >= 0).all()
    assert (found[6:] >= 2.3e38).all()


@dataclass(frozen=True)
class Attention:
    """One sequence of calls: `padding` is how many negative positions each batch row begins with."""

    chunks: tuple[int, ...]
    padding: tuple[int, ...]
    heads: tuple[int, int]
    head_dim: int
    window: int
    dtype: str = "float32"
    scale: float = 0.25


ATTENTION = {
    "decode-crosses-the-window-twice": Attention((1,) * 11, (0,), (4, 2), 16, 5),
    "one-chunk-far-longer-than-the-window": Attention((16,), (0,), (3, 1), 20, 5),
    "chunks-and-decode-with-padding": Attention((3, 3, 16, 1, 1, 3), (2,), (4, 4), 20, 8),
    "two-rows-one-padded-beyond-a-chunk": Attention((3, 3, 16, 3, 1, 1), (1, 5), (6, 2), 16, 8, scale=0.7),
    "window-of-one": Attention((3, 1, 1), (0,), (4, 1), 16, 1),
    "window-never-full": Attention((16, 3, 1), (4,), (3, 1), 64, 64),
    "head-dim-128": Attention((3, 3, 1), (1, 0), (4, 1), 128, 4),
    "float16": Attention((3, 3, 1, 16, 1), (2, 0), (4, 1), 20, 8, "float16"),
    "float16-long": Attention((16,) * 3, (3,), (2, 2), 64, 33, "float16"),
}


def attention_inputs(case, generator):
    """qkv, positions, cos and sin of all tokens. Padding is NaN, to show whether anything reads it; float16 rings get quarter turns, whose
    rotation is exact, so that no rounding to float16 can fall on either side."""
    total, batch, half = sum(case.chunks), len(case.padding), case.head_dim // 2
    qkv = generator.standard_normal((batch, total, (case.heads[0] + 2 * case.heads[1]) * case.head_dim)).astype(np.float32)
    positions = np.arange(total) - np.array(case.padding)[:, None]
    qkv[positions < 0] = np.nan
    if case.dtype == "float16":
        turns = generator.integers(0, 4, (batch, 1, total, half))
        return qkv, positions, np.array([1, 0, -1, 0], np.float32)[turns], np.array([0, 1, 0, -1], np.float32)[turns]
    angles = generator.uniform(-np.pi, np.pi, (batch, 1, total, half))
    return qkv, positions, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotated(x, cos, sin):
    """x (tokens, heads, D), cos and sin (tokens, D / 2)."""
    a, b = np.split(x, 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


def attention_reference(case, qkv, positions, cos, sin):
    """One row's outputs (tokens, heads, D), their error bounds, and its keys and values as stored, in float64."""
    h, kv = case.heads
    d = case.head_dim
    parts = qkv.astype(np.float64).reshape(len(qkv), h + 2 * kv, d)
    query = rotated(parts[:, :h], cos, sin)
    key, value = (x.astype(case.dtype).astype(np.float64) for x in (rotated(parts[:, h : h + kv], cos, sin), parts[:, h + kv :]))
    out, bounds = np.zeros(query.shape), np.zeros(query.shape)
    for i in np.flatnonzero(positions >= 0):
        seen = (positions >= 0) & (positions <= positions[i]) & (positions > positions[i] - case.window)
        for head in range(h):
            k, v = key[seen, head // (h // kv)], value[seen, head // (h // kv)]
            scores = k @ query[i, head] * case.scale
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            out[i, head] = shares @ v
            # Rotation and scaling: 3 roundings on q, 3 on k, relative to what is rotated; the dot D + 1. A score that is off by e moves its
            # share by e, and the sum of shares by as much; then exp and the sums over the seen columns.
            size = np.abs(np.concatenate([k, np.roll(k, d // 2, -1)])).max(-1).max() * np.abs(parts[i, head]).sum() * 2 * case.scale
            error = 2 * (d + 7) * U * size + (2 * EXP_ULPS + 2 * len(k) + 4) * U
            bounds[i, head] = error * (shares @ np.abs(v))
    return out, bounds, key, value


@pytest.mark.parametrize("name", ATTENTION)
def test_rolling_attention(name):
    case = ATTENTION[name]
    generator = np.random.default_rng(0)
    qkv, positions, cos, sin = attention_inputs(case, generator)
    (h, kv), d, batch = case.heads, case.head_dim, len(case.padding)
    rings = [aligned(np.full((batch, kv, case.window, d), np.nan, case.dtype)) for _ in range(2)]
    found = []
    start = 0
    kernels = {t: compiled(rolling_attention(RollingAttention(batch, t, h, kv, d, case.window, case.dtype, case.scale))) for t in set(case.chunks)}
    for tokens in case.chunks:
        part = slice(start, start + tokens)
        out = output(batch, tokens, h * d)
        inputs = (np.ascontiguousarray(x) for x in (qkv[:, part], cos[:, :, part], sin[:, :, part], positions[:, part]))
        call(kernels[tokens], *inputs, *rings, out)
        found.append(out)
        start += tokens
    found = np.concatenate(found, 1).reshape(batch, -1, h, d)
    for b in range(batch):
        expected, bounds, key, value = attention_reference(case, qkv[b], positions[b], cos[b, 0], sin[b, 0])
        assert (np.abs(found[b] - expected) <= bounds).all()  # rows of padding included: zero, not NaN
        check_ring(rings[0][b], key, positions[b], 3 * U * 2 if case.dtype == "float32" else 0)
        check_ring(rings[1][b], value, positions[b], 0)


def check_ring(ring, columns, positions, relative):
    """The last W positions lie at slot = position mod W; what was never written is still NaN."""
    window = ring.shape[1]
    last = positions[-1]
    for slot in range(window):
        position = last - (last - slot) % window
        if position < 0:
            assert np.isnan(ring[:, slot]).all()
        else:
            expected = columns[position - positions[0]]
            assert (np.abs(ring[:, slot] - expected) <= relative * np.nanmax(np.abs(columns))).all()


def called(function, arrays):
    """All arrays, as the kernel left them."""
    held = [aligned(array) for array in arrays]
    call(compiled(function), *held)
    return held


# One token (its own code) and several, sizes that are and are not multiples of a panel or a vector, more pairs of an expert than a tile of rows.
MIXTURE = [(1, 64, 96, "int8"), (1, 33, 7, "float32"), (1, 34, 30, "float16"), (5, 40, 33, "float16"), (7, 33, 7, "float32"), (70, 64, 48, "int8")]


@pytest.mark.parametrize(("tokens", "dim", "hidden_dim", "dtype"), MIXTURE)
def test_mixture(tokens, dim, hidden_dim, dtype):
    check_mixture(lambda shape, arrays: called(mixture(shape), arrays), PANEL, tokens, dim, hidden_dim, dtype)


def test_mixture_survives_scores_that_are_no_numbers():
    """The answer is meaningless, but every token still goes to experts that exist, so that nothing is read or written beyond the arrays."""
    shape = Mixture((1, 3), 8, 8, 4, 2, "float32", False)
    x, weights = np.ones((1, 3, 8), np.float32), [np.ones((4, 8, PANEL), np.float32)] * 2
    scores = np.full((1, 3, 4), np.nan, np.float32)
    scratch = [np.zeros(size, kind) for size, kind in shape.scratch]
    *_, chosen, _share, count, _members, _both, _gated, _mixed = called(mixture(shape), [x, scores, *weights, output(1, 3, 8), *scratch])
    assert set(chosen.tolist()) <= {0, 1, 2, 3}
    assert count.sum() == 6
