"""Seeded inputs for each kernel of a CUDA library, and the expected outputs: references in float64, with numpy alone.

References are computed for a sample of rows and outputs, so that a model's full sizes take only seconds; whether every
output is written is checked on all of them. Bounds follow from float32 (`runtime.gpu_check.packed_matrix.sum_error`),
and from float16 where activations may be rounded to it; exp is CUDA's, accurate to 2 ulp.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import prod

import numpy as np

from runtime.artifact.layouts import PANEL
from runtime.artifact.manifest import KernelCall
from runtime.gpu_check.attention_case import rolling_attention
from runtime.gpu_check.kernel_case import Expected, KernelCase, empty
from runtime.gpu_check.packed_matrix import EPS, Array, PackedMatrix
from runtime.gpu_check.random_tensors import PARTS, Random, stacked_numbers

ROWS, PANELS = 8, 24  # how much of a large result is compared
MATRIX = ("w", "s", "z", "order")  # parameters of a product and of an embedding, as far as there are any
BLOCK_PANELS = 16  # panels of a matrix that are in float64 at once, for each thread
HALF_ULP = 2.0**-11  # of float16, relative
SMALL = 2.0**-7  # size of an x that goes into a norm
# Error of a norm: no thread sums more than a few dozen squares, nor do the lanes after it; then come a root, a division
# and products.
NORM_ERROR = 64 * EPS
TEMPERATURE, TOP_K = 0.75, 40  # for a sampled id
LONGEST_CONTEXT = 262144  # of any model of the family


def case_of(call: KernelCall, *, half: bool, seed: int = 0) -> KernelCase:
    """Inputs and expectations for one kernel.

    If `half`, kernels of several rows may round the factors of their products to float16, as tensor cores take it.
    """
    rounding = HALF_ULP if half and _rows(call) > 1 else 0.0
    return MAKERS[call.op](call, Random(seed), rounding)


def _rows(call: KernelCall) -> int:
    """Rows of one call's products: its tokens; in attention, those of one sequence."""
    first = call.arguments[0]
    if isinstance(first, Mapping):
        return prod(first["lead"]) if "lead" in first else int(first["tokens"])
    return prod(first) if isinstance(first, Sequence) else 1


def _matrix(
    call: KernelCall, random: Random, names: Sequence[str], n: int, k: int, group_size: int | None, stacked: int = 1
) -> tuple[list[Array], list[PackedMatrix]]:
    """The arrays of those parameters `names` that exist, and the matrices they hold.

    The names are those of numbers, scales, offsets and the order of the columns.
    """
    specs = {spec.name: spec for spec in call.parameters}
    numbers = specs[names[0]]
    arrays = [
        (
            None
            if name not in specs
            else stacked_numbers(specs[name], k)
            if kind == "numbers" and stacked > 1
            else random.part(kind, specs[name], numbers.dtype, k)
        )
        for kind, name in zip(PARTS, names, strict=False)
    ]
    parts = [[None] * stacked if array is None else np.split(array, stacked) for array in arrays]
    matrices = [PackedMatrix(n, k, group_size, *(part[i] for part in parts)) for i in range(stacked)]  # type: ignore[arg-type]
    return [array for array in arrays if array is not None], matrices


def _linear(call: KernelCall, random: Random, rounding: float) -> KernelCase:
    """y = x W^T, if requested with a norm of x before it and SwiGLU or a residual after it. x is exact in float16.

    Factors that are rounded to float16 before the product, a normed x and weights of groups, add their share of its
    size.
    """
    (arguments,) = call.arguments
    n, k, x_spec = arguments["n"], arguments["k"], call.parameters[0]
    group_size, eps = arguments["weight"]["group_size"], arguments["norm_eps"]
    halves = 2 if arguments["swiglu"] else 1
    names = [spec.name for spec in call.parameters]
    x = random.normal(x_spec.shape, "float16", 1.0 if eps is None else SMALL).astype(np.float32)
    gain = [random.uniform((k,), 0.5, 1.5, "float32")] if "gain" in names else []
    weights, (matrix,) = _matrix(call, random, MATRIX, n, k, group_size)
    residual = [random.normal(call.parameters[names.index("residual")].shape)] if "residual" in names else []
    y_rows = random.sample(prod(arguments["lead"]), ROWS)
    column = random.whole((1,), 0, arguments["one_of"], "int64") if "column" in names else None
    wide = x.reshape(-1, k)[y_rows if column is None else column].astype(np.float64)
    if gain:
        wide = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps) * gain[0]
    loss = NORM_ERROR * len(gain) + rounding * (len(gain) + matrix.grouped)  # of the factors, each by itself
    output, n_out = len(call.parameters) - 1, n // halves
    expected = []
    for p in random.sample(-(-n_out // PANEL), PANELS):
        columns = slice(p * PANEL, min((p + 1) * PANEL, n_out))
        results = [
            _lossy(matrix, wide, half * n_out // PANEL + p, loss, one=len(y_rows) == 1) for half in range(halves)
        ]
        values, bound = _gated_products(*results) if halves == 2 else results[0]
        if residual:
            values = values + residual[0].reshape(-1, n_out)[y_rows, columns]
            bound = bound + EPS * np.abs(values)
        expected.append(Expected(output, _part(y_rows, columns, n_out), values, bound))
    held = tuple(i for i, name in enumerate(names) if name in MATRIX)
    inputs = [x, *([] if column is None else [column]), *gain, *weights, *residual]
    return KernelCase([*inputs, empty(call.parameters[output])], held, output, tuple(expected))


def _part(rows: Sequence[int], columns: slice, n_out: int) -> Callable[[Array], Array]:
    """Some rows and columns of an output (..., n_out)."""
    return lambda y: y.reshape(-1, n_out)[rows, columns]


def _lossy(matrix: PackedMatrix, x: Array, p: int, loss: float, *, one: bool) -> tuple[Array, Array]:
    """x times one panel, and the bound if the factors are off by a relative `loss`; `one`: x is a single row."""
    values, bound = matrix.times(x, p, p + 1, one_row=one)
    return values, bound + loss * (np.abs(x) @ np.abs(matrix.rows(p, p + 1)).T)


def _gated_products(gate: tuple[Array, Array], up: tuple[Array, Array]) -> tuple[Array, Array]:
    """silu(gate) * up of two products with their bounds: silu has a slope of at most 1.1, and a few roundings."""
    (gate_values, gate_bound), (up_values, up_bound) = gate, up
    silu = gate_values / (1 + np.exp(-gate_values))
    values = silu * up_values
    return values, 1.1 * gate_bound * (np.abs(up_values) + up_bound) + np.abs(silu) * up_bound + 4 * EPS * np.abs(
        values
    )


def _embedding(call: KernelCall, random: Random, _rounding: float) -> KernelCase:
    """Rows of a matrix; a number times its scale, and the sum of that and a minimum, are rounded."""
    (arguments,) = call.arguments
    n, k = arguments["n"], arguments["k"]
    ids = random.whole(call.parameters[0].shape, 0, n, "int64")
    ids.flat[0] = n - 1
    weights, (matrix,) = _matrix(call, random, MATRIX, n, k, arguments["weight"]["group_size"])
    rows = random.sample(ids.size, ROWS)
    tokens = ids.reshape(-1)[rows]
    values, terms = (
        np.concatenate([part(t // PANEL, t // PANEL + 1)[t % PANEL : t % PANEL + 1] for t in tokens])
        for part in (matrix.rows, matrix.terms)
    )
    output = len(call.parameters) - 1
    expected = Expected(output, lambda y: y.reshape(-1, k)[rows], values, EPS * terms)
    return KernelCase([ids, *weights, empty(call.parameters[output])], tuple(range(1, output)), output, (expected,))


def _rms_norm(call: KernelCall, random: Random, _rounding: float) -> KernelCase:
    """x / sqrt(mean(x^2) + eps) * weight, for an x so small that eps matters."""
    _, dim, eps = call.arguments
    x, weight = random.normal(call.parameters[0].shape, scale=SMALL), random.normal((dim,))
    wide = x.astype(np.float64)
    values = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps) * weight
    expected = Expected(2, lambda y: y, values, NORM_ERROR * np.abs(values))
    return KernelCase([x, weight, empty(call.parameters[2])], (1,), 2, (expected,))


def _swiglu(call: KernelCall, random: Random, _rounding: float) -> KernelCase:
    """silu(gate) * up: exp to 2 ulp, an addition, a division, a product."""
    both = random.normal(call.parameters[0].shape, scale=4.0)
    gate, up = np.split(both.astype(np.float64), 2, axis=-1)
    values, bound = _gated_products((gate, np.zeros(1)), (up, np.zeros(1)))
    return KernelCase([both, empty(call.parameters[1])], (), 1, (Expected(1, lambda y: y, values, bound),))


def _residual(call: KernelCall, random: Random, _rounding: float) -> KernelCase:
    """a + b, rounded once."""
    a, b = (random.normal(spec.shape) for spec in call.parameters[:2])
    values = a.astype(np.float64) + b
    return KernelCase(
        [a, b, empty(call.parameters[2])], (), 2, (Expected(2, lambda y: y, values, EPS / 2 * np.abs(values)),)
    )


def _rotation(call: KernelCall, random: Random, _rounding: float) -> KernelCase:
    """cos or sin of position times frequency: the angle is rounded once, the function is accurate to 2 ulp.

    A factor of the result is rounded, and so is the product with it.
    """
    _, _, function, factor = call.arguments
    positions_spec, frequencies_spec = call.parameters[:2]
    positions = random.whole(positions_spec.shape, 0, LONGEST_CONTEXT, "int64")
    frequencies = random.uniform(frequencies_spec.shape, 1e-6, 1.0, "float32")
    angles = positions[:, None, :, None].astype(np.float64) * frequencies
    values = {"cos": np.cos, "sin": np.sin}[function](angles) * factor
    bound = (EPS / 2 * np.abs(angles) + 2 * EPS + (EPS if factor != 1 else 0)) * factor
    expected = Expected(2, lambda y: y, values, bound)
    return KernelCase([positions, frequencies, empty(call.parameters[2])], (), 2, (expected,))


def _sample(call: KernelCall, random: Random, _rounding: float) -> KernelCase:
    """Top-k of logits at a temperature, with a draw in the middle of an id's share: float32 errors do not leave it."""
    (vocab_size,) = call.arguments
    logits = random.normal((1, 1, vocab_size), scale=3.0)
    scores = logits.reshape(-1).astype(np.float64) / TEMPERATURE
    ids = np.sort(np.argsort(scores)[-min(TOP_K, vocab_size) :])
    mass = np.cumsum(np.exp(scores[ids] - scores.max()))
    chosen = int(np.searchsorted(mass, mass[-1] / 2, side="right"))
    draw = (mass[chosen] + (mass[chosen - 1] if chosen else 0.0)) / 2 / mass[-1]
    options = np.array([TEMPERATURE, TOP_K, draw], np.float32)
    position = random.whole((1, 1), 0, LONGEST_CONTEXT, "int64")
    found = ((2, np.full((1, 1), ids[chosen])), (3, position + 1), (4, np.full(1, ids[chosen])))
    expected = tuple(Expected(i, lambda y: y, values.astype(np.float64), np.zeros(values.shape)) for i, values in found)
    return KernelCase(
        [logits, options, np.zeros((1, 1), np.int64), position, empty(call.parameters[4])], (), 4, expected
    )


def _mixture(call: KernelCall, random: Random, rounding: float) -> KernelCase:
    """A sample of tokens, each with its best experts.

    They compute silu(w1 x) * (w3 x) through w2, weighted by the softmax over their scores.
    """
    (arguments,) = call.arguments
    dim, hidden_dim, n_experts, per_token = (
        arguments[name] for name in ("dim", "hidden_dim", "n_experts", "experts_per_token")
    )
    group_size = arguments["weight"]["group_size"]
    x = random.normal(call.parameters[0].shape, "float16").astype(np.float32)
    scores = random.normal(call.parameters[1].shape)
    up_arrays, up = _matrix(call, random, ("w13", "s13"), 2 * hidden_dim, dim, group_size, n_experts)
    down_arrays, down = _matrix(call, random, ("w2", "s2"), dim, hidden_dim, group_size, n_experts)
    inputs = [x, scores, *up_arrays, *down_arrays]
    output = len(inputs)
    rows, panels = random.sample(x.size // dim, 2), random.sample(-(-dim // PANEL), PANELS)
    columns = np.concatenate([np.arange(p * PANEL, min((p + 1) * PANEL, dim)) for p in panels])
    results = [
        _expert_sum(x.reshape(-1, dim)[i], scores.reshape(-1, n_experts)[i], up, down, per_token, rounding, panels)
        for i in rows
    ]
    values, bounds = (np.stack(part) for part in zip(*results, strict=True))
    expected = Expected(output, lambda y: y.reshape(-1, dim)[np.array(rows)[:, None], columns], values, bounds)
    return KernelCase(
        [*inputs, *(empty(spec) for spec in call.parameters[output:])], tuple(range(2, output)), output, (expected,)
    )


def _expert_sum(
    x: Array,
    scores: Array,
    up: Sequence[PackedMatrix],
    down: Sequence[PackedMatrix],
    per_token: int,
    rounding: float,
    panels: Sequence[int],
) -> tuple[Array, Array]:
    """Some panels of one token's output, and their bound.

    The share has a few roundings, and w2's input may be rounded first.
    """
    best = sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:per_token]
    shares = np.exp(scores[best].astype(np.float64) - scores[best[0]])
    sums = []
    for expert, share in zip(best, shares / shares.sum(), strict=True):
        both, error = _whole_product(up[expert], x.astype(np.float64))
        (gate, raised), (gate_error, up_error) = np.split(both, 2), np.split(error, 2)
        hidden, hidden_error = _gated_products((gate, gate_error), (raised, up_error))
        hidden_error = hidden_error + rounding * np.abs(hidden)
        found = [_with_error(down[expert], hidden, hidden_error, p) for p in panels]
        output, bound = (np.concatenate(part) for part in zip(*found, strict=True))
        sums.append((share * output, share * (bound + 8 * EPS * np.abs(output))))
    values, bounds = (sum(part) for part in zip(*sums, strict=True))
    return values, bounds


def _with_error(matrix: PackedMatrix, x: Array, x_error: Array, p: int) -> tuple[Array, Array]:
    """One panel times x, and the bound if x is off by as much as `x_error`."""
    value, bound = matrix.times(x, p, p + 1)
    return value, bound + np.abs(matrix.rows(p, p + 1)) @ x_error


def _whole_product(matrix: PackedMatrix, x: Array) -> tuple[Array, Array]:
    """A whole matrix times x, and the bound: blocks of panels, on all processors, since an expert has 10**8 weights."""
    blocks = [(p, min(p + BLOCK_PANELS, matrix.panels)) for p in range(0, matrix.panels, BLOCK_PANELS)]
    with ThreadPoolExecutor() as threads:
        found = list(threads.map(lambda block: matrix.times(x, *block), blocks))
    values, bounds = (np.concatenate(part) for part in zip(*found, strict=True))
    return values, bounds


MAKERS: Mapping[str, Callable[[KernelCall, Random, float], KernelCase]] = {
    "linear": _linear,
    "embedding": _embedding,
    "rms_norm": _rms_norm,
    "swiglu": _swiglu,
    "residual": _residual,
    "rotation": _rotation,
    "rolling_attention": rolling_attention,
    "mixture": _mixture,
    "sample": _sample,
}
