"""A mixture of experts from its definition, in float64, and a check that calls its kernel on random numbers."""

import numpy as np

from build.kernels.shapes import Mixture
from export.weights.format import Storage
from export.weights.panels import to_panels

U = 2.0**-24
EXPERTS, PER_TOKEN = 5, 2
UNLOVED = 3  # an expert that no token chooses


def stacked_weight(rng, n, k, dtype):
    """One (N, K) matrix for each expert, stacked, and scales if it is int8; entries are about 1 / sqrt(K)."""
    if dtype == "int8":
        return rng.integers(-127, 128, (EXPERTS, n, k), dtype=np.int8), rng.uniform(0.5, 1, EXPERTS * n).astype(
            np.float32
        ) / np.float32(127 * k**0.5)
    return (rng.standard_normal((EXPERTS, n, k)) / k**0.5).astype(dtype), None


def wide(weight, scale):
    return weight.astype(np.float64) * (1 if scale is None else scale.reshape(EXPERTS, -1, 1).astype(np.float64))


def expected(x, scores, w13, w2, rounding=0.0):
    """The mixture's output (tokens, dim), and how far a float32 result may be from it.

    The arguments are (tokens, dim), (tokens, experts), (experts, 2 hidden, dim) and (experts, dim, hidden). `rounding`
    is the relative error of the second product's input.

    A sum of K products is off by at most (K + 2) u sum |w x|, a scale included (Higham, section 3.1). silu has a slope
    of at most 1.1 and is computed with some roundings of its own (exp to 2 ulp, addition, division, product); likewise
    the share.
    """
    result, bound = np.zeros(x.shape), np.zeros(x.shape)
    for i, row in enumerate(x.astype(np.float64)):
        best = sorted(range(EXPERTS), key=lambda e: (-scores[i, e], e))[:PER_TOKEN]
        shares = np.exp(scores[i, best].astype(np.float64) - scores[i, best[0]])
        for e, share in zip(best, shares / shares.sum(), strict=True):
            gate, up = np.split(w13[e] @ row, 2)
            gate_error, up_error = np.split((len(row) + 2) * U * (np.abs(w13[e]) @ np.abs(row)), 2)
            silu = gate / (1 + np.exp(-gate))
            error = np.abs(up) * 1.1 * gate_error + np.abs(silu) * up_error + (8 * U + rounding) * np.abs(silu * up)
            output = w2[e] @ (silu * up)
            result[i] += share * output
            bound[i] += share * (
                np.abs(w2[e]) @ error
                + (len(up) + 2) * U * (np.abs(w2[e]) @ np.abs(silu * up))
                + 16 * U * np.abs(output)
            )
    return result, bound


def check(make_and_run, tokens, dim, hidden_dim, dtype, pack=to_panels, *, rounds=False):
    """Compare a kernel with `expected`: `make_and_run(shape, arrays)` calls it and returns all its arrays.

    The output follows the inputs. `pack` is the target's packing function. A kernel that `rounds` may round activations
    to float16, so x is exact in float16.
    """

    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((1, tokens, dim)).astype(np.float32)
    x = x.astype(np.float16).astype(np.float32) if rounds else x
    scores = rng.standard_normal((1, tokens, EXPERTS)).astype(np.float32)
    scores[..., UNLOVED] = -100
    scores[0, -1] = 1  # a tie: the first experts are chosen
    (w13, s13), (w2, s2) = (stacked_weight(rng, n, k, dtype) for n, k in ((2 * hidden_dim, dim), (dim, hidden_dim)))
    shape = Mixture((1, tokens), dim, hidden_dim, EXPERTS, PER_TOKEN, Storage(dtype=dtype))

    def packed(weight):
        return np.concatenate([pack(matrix) for matrix in weight])

    weights = [packed(w13), packed(w2)] if s13 is None else [packed(w13), s13, packed(w2), s2]
    scratch = [np.full(size, np.nan if kind == "float32" else -(2**30), kind) for size, kind in shape.scratch]
    inputs = [x, scores, *weights]
    found = make_and_run(shape, [*inputs, np.full((1, tokens, dim), np.nan, np.float32), *scratch])[len(inputs)]
    reference, bound = expected(x[0], scores[0], wide(w13, s13), wide(w2, s2), 2.0**-11 if rounds else 0.0)
    assert np.all(np.abs(found[0] - reference) <= bound)
