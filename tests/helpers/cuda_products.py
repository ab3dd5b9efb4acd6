"""Products of CUDA kernels against numpy in float64: random matrices in every format, and what may be off."""

import numpy as np

from build.kernels.cuda import few_rows, linear, tensor_core
from build.kernels.shapes import Linear
from export.weights.format import ModelTensor, Storage
from export.weights.table import carry, load, store
from tests.helpers.encoded import rows_for
from tests.helpers.kernels import packed

FLOAT32 = np.finfo(np.float32).eps
NORM_EPS = 1e-5


def garbage(shape):
    return np.full(shape, np.nan, np.float32)


def weights(rng, n, k, stored):
    """The packed arrays of a random (N, K) matrix, and its numbers as kernels use them, in float64."""
    tensor = ModelTensor(name="w", shape=(n, k), stored=stored)
    if stored in CARRIED.values():
        arrays = carry(tensor, rows_for(stored, n, k, seed=int(rng.integers(100))))
    else:
        arrays = store(tensor, rng.standard_normal((n, k)).astype(np.float32))
    parts = packed(tensor, arrays, "cuda")
    return parts, load(tensor, arrays).astype(np.float64)


INT4 = {
    "int4": Storage(dtype="int4", group_size=32),
    "int4-zeros": Storage(dtype="int4", group_size=64, offsets="zero_points"),
}
ROUNDED = {
    "float32": Storage(dtype="float32"),
    "float16": Storage(dtype="float16"),
    "int8": Storage(dtype="int8"),
    **INT4,
}
CARRIED = {  # from checkpoints
    "int4-minimums": Storage(dtype="int4", group_size=32, offsets="minimums"),
    "int4-float32": Storage(dtype="int4", group_size=256, offsets="zero_points", scales="float32"),
    "int4-order": Storage(dtype="int4", group_size=128, offsets="zero_points", reordered=True),
    "int8-groups": Storage(dtype="int8", group_size=16, scales="float32"),
    "int8-zeros": Storage(dtype="int8", group_size=64, offsets="zero_points"),
    "int8-minimums": Storage(dtype="int8", group_size=32, offsets="minimums", scales="float32"),
    "int8-order": Storage(dtype="int8", reordered=True),
    "float8": Storage(dtype="float8"),
    "float8-groups": Storage(dtype="float8", group_size=128, scales="float32"),
}
FORMATS = {**ROUNDED, **CARRIED}
# The largest number that a kernel adds up for a weight, and subtracts again, in scales: 16 (1 + q / 16) and 16 + zero
# for int4, q and zero for int8.
LARGEST = {"int4": 31 + 31, "int8": 128 + 128}


def to_rows(panels, n):
    """(panels, K, 32) back to (N, K)."""
    return panels.transpose(0, 2, 1).reshape(-1, panels.shape[1])[:n]


def sizes(stored, arrays, wide):
    """Magnitudes of what a kernel adds up for each of the weights `wide` (N, K), without x."""
    if not stored.grouped or (stored.dtype, stored.offsets) == ("int8", "none") or stored.dtype == "float8":
        return np.abs(wide)
    n, k = wide.shape

    def spread(panels):
        return np.repeat(to_rows(panels, n), stored.group_size, axis=1)[:, :k].astype(np.float64)

    found = LARGEST[stored.dtype] * np.abs(spread(arrays[1]))
    if stored.minimums:
        found += np.abs(spread(arrays[2]))
    if stored.reordered:
        found[:, arrays[-1]] = found.copy()
    return found


def check_tensor_cores(gpu, rows, n, k, name, **options):
    """Compare a product of x that is rounded to float16 with numpy in float64."""
    rng = np.random.default_rng(rows)
    x = rng.standard_normal((1, rows, k)).astype(np.float32)
    arrays, wide = weights(rng, n, k, FORMATS[name])
    stored, error = FORMATS[name], 0
    shape = Linear((1, rows), n, k, stored)
    assert tensor_core.suits(shape) or few_rows.suits(shape)
    kernel = gpu.compiled(linear.linear, shape, tensor_cores=True, **options)
    *_, y = gpu.run(kernel, x, *arrays, garbage((1, rows, n)))
    rounded = x.astype(np.float16).astype(np.float64)
    if stored.grouped and stored.scales == "float16" and not stored.minimums:  # exact before it is rounded to float16
        wide = wide.astype(np.float16).astype(np.float64)
    elif stored.grouped:  # two or three roundings in float32, then one to float16, in which 2**-24 is the least number
        lost = 2 * FLOAT32 * sizes(stored, arrays, wide) + 2.0**-11 * np.abs(wide) + 2.0**-25
        error = np.abs(rounded) @ lost.T
    assert np.all(np.abs(y - rounded @ wide.T) <= error + (k + 4) * FLOAT32 * (np.abs(rounded) @ np.abs(wide).T))


def check_what_is_fused(gpu, shape, tensor_cores, **options):
    """Compare a product, and what is fused with it, with numpy in float64."""
    assert tensor_core.suits(shape) == tensor_cores or shape.rows == 18 or few_rows.suits(shape)
    rng = np.random.default_rng(shape.n)
    x = rng.standard_normal((*shape.x_lead, shape.k)).astype(np.float32)
    gain = [rng.uniform(0.5, 1.5, shape.k).astype(np.float32)] if shape.norm_eps else []
    residual = [rng.standard_normal((*shape.lead, shape.n_out)).astype(np.float32)] if shape.residual else []
    arrays, wide = weights(rng, shape.n, shape.k, shape.weight)
    kernel = gpu.compiled(linear.linear, shape, tensor_cores=tensor_cores, **options)
    rows = x.reshape(-1, shape.k)
    column = [np.array([3])] if shape.one_of else []
    if column:
        rows = rows[column[0]].copy()
        x[0, np.arange(shape.one_of) != column[0]] = np.nan  # nothing else is read
    *_, y = gpu.run(kernel, x, *column, *gain, *arrays, *residual, garbage((*shape.lead, shape.n_out)))
    rows = rows.astype(np.float64)
    if gain:
        rows = rows / np.sqrt(np.mean(rows**2, -1, keepdims=True) + NORM_EPS) * gain[0]
    both, magnitude = rows @ wide.T, np.abs(rows) @ np.abs(wide).T
    # K products and sums as in `test_linear`, a norm with relative error (K / 4 + 4) eps; tensor cores round x, and
    # weights of groups, by half an ulp each
    error = (1.25 * shape.k + 8) * FLOAT32 * (np.abs(rows) @ sizes(shape.weight, arrays, wide).T)
    error += 2.0**-10 * magnitude if tensor_cores else 0
    if shape.swiglu:  # silu has a slope of at most 1.1
        (gate, up), (gate_error, up_error) = np.split(both, 2, axis=1), np.split(error, 2, axis=1)
        silu = gate / (1 + np.exp(-gate))
        both, error = (
            silu * up,
            1.1 * gate_error * (np.abs(up) + up_error) + np.abs(silu) * up_error + 4 * FLOAT32 * np.abs(silu * up),
        )
    if residual:
        both = both + residual[0].reshape(both.shape)
        error = error + FLOAT32 * np.abs(both)
    assert np.all(np.abs(y.reshape(both.shape) - both) <= error)
    assert y.std() > 0.1  # the bound is not so wide that anything would pass
