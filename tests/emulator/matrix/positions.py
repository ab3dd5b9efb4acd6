"""Attention that begins at chosen positions, on rings that hold no numbers wherever nothing was written.

Before the first token, at and around the end of a full window and of a ring, after several rounds, and padding alone;
for steps of several slots, and for chunks, of which some end with padding.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from build.kernels.cuda import attention, flash_attention
from build.kernels.cuda.binding import GPU
from tests.emulator.kernels import Array, EmulatedKernels, Kernel
from tests.emulator.matrix.rows import RUNS, Row, results
from tests.helpers import cache_reference
from tests.helpers.attention_reference import (
    Call,
    Model,
    angles,
    check_rings,
    chunk,
    is_rounded,
    output_of,
    reference,
    rings_of,
    step,
    tolerance,
)

# Tokens of a call, and a model whose ring is as long as its window and a call need.
SHAPES = (
    *((1, heads, kv_heads, dim, window) for heads, kv_heads, dim, window in ((4, 2, 16, 32), (6, 2, 36, 70))),
    *((1, heads, kv_heads, dim, window) for heads, kv_heads, dim, window in ((8, 1, 128, 40), (8, 2, 128, 1000))),
    (5, 4, 2, 16, 32),
    (3, 6, 2, 36, 70),
    (2, 2, 1, 16, 1),
    (16, 4, 2, 32, 32),
    (64, 8, 2, 128, 96),
    (33, 5, 1, 64, 70),
    (17, 1, 1, 32, 3),
    (20, 4, 1, 128, 1000),
)
DTYPES = ("float32", "float16", "float8_e4m3fn", "int8", "uint8")
SLOTS = 3


def rows(kernels: EmulatedKernels) -> Iterator[Row]:
    """A row for each shape, dtype of the rings and run: the worst of all positions."""
    for tokens, heads, kv_heads, dim, window in SHAPES:
        for dtype in DTYPES:
            if dim % 32 and dtype == "uint8":
                continue  # groups of 32
            model = Model(heads, kv_heads, dim, window, window + max(tokens, SLOTS) - 1, SLOTS)
            yield from _rows_of_model(kernels, model, tokens, dtype)


def _rows_of_model(kernels: EmulatedKernels, model: Model, tokens: int, dtype: str) -> Iterator[Row]:
    calls = _steps(model) if tokens == 1 else _chunks(model, tokens)
    shape = model.shape(len(calls[0].slots), tokens, dtype)
    tensor_cores = dtype != "float32"
    name = "steps" if tokens == 1 else "flash" if tensor_cores and flash_attention.suits(shape) else "chunks"
    kernel = kernels.compiled(attention.rolling_attention(shape, on=GPU, tensor_cores=tensor_cores))
    worst = dict.fromkeys(RUNS, 0.0)
    wrong: dict[object, str] = {}
    for seed, call in enumerate(calls):
        for run, found in _shares(kernels, kernel, model, dtype, call, seed, tensor_cores=name == "flash"):
            if isinstance(found, str):
                wrong.setdefault(run, f"{call}: {found}")
            else:
                worst[run] = max(worst[run], found)
    label = f"{tokens} tokens, {model.heads} / {model.kv_heads} heads of {model.dim}, window {model.window}, {dtype}"
    for run in RUNS:
        ok = run not in wrong and worst[run] <= 1
        yield Row(name, label, str(run), wrong.get(run, f"{worst[run]:.2g} in {len(calls)} calls"), ok)


def _firsts(model: Model, tokens: int) -> list[int]:
    """Positions at which a call may begin, each once."""
    W, L = model.window, model.ring_len
    near = (0, 1, W - 1, W, W + 1, L - 1, L, L + 1, 2 * L + 3, 5 * L + L // 2, W - tokens, L - tokens)
    return sorted({position for position in near if position >= 0})


def _steps(model: Model) -> list[Call]:
    """Rows of different slots at different positions; now and then two of one slot, and padding."""
    firsts = _firsts(model, 1)
    calls = [step(*((slot, firsts[(i + 3 * slot) % len(firsts)]) for slot in range(SLOTS))) for i in range(len(firsts))]
    return [*calls, step((0, -1), (1, -1), (2, -1)), step((1, model.window + 1), (0, -1), (1, model.window))]


def _chunks(model: Model, tokens: int) -> list[Call]:
    """Chunks that are full, that end with padding, and that are padding alone."""
    counts = (tokens, tokens - 1, tokens // 2 + 1)
    calls = [chunk(i % SLOTS, first, counts[i % 3], tokens) for i, first in enumerate(_firsts(model, tokens))]
    return [*calls, chunk(0, 0, 0, tokens)]


def _shares(
    kernels: EmulatedKernels, kernel: Kernel, model: Model, dtype: str, call: Call, seed: int, *, tensor_cores: bool
) -> Iterator[tuple[object, float | str]]:
    """For each run, the largest error as a share of the bound, or what is wrong."""
    rng = np.random.default_rng(seed)
    exact = is_rounded(dtype)
    positions, slots = np.array(call.positions), np.array(call.slots)
    shape = model.shape(*positions.shape, dtype)
    rings, history, columns = _filled(model, dtype, call, rng)
    qkv = rng.standard_normal((*positions.shape, shape.qkv_dim)).astype(np.float32)
    cos, sin = angles(positions, model.dim // 2, rng if exact else None)
    expected = reference(shape, qkv, cos, sin, call, history, columns)
    arrays = [qkv, cos, sin, positions, slots, *rings, output_of(shape)]
    seen, atol = positions >= 0, tolerance(dtype, exact=exact, tensor_cores=tensor_cores)

    def error(found: Sequence[Array]) -> float | str:
        *rings_after, out = found[5:]
        try:
            check_rings(rings_after, rings, columns, exact=exact)
        except AssertionError as error:
            return f"a ring is wrong: {error}"
        return float(np.abs(out[seen] - expected[seen]).max(initial=0.0)) / atol if np.isfinite(out).all() else np.inf

    for run, found in results(kernels, kernel, arrays, range(5, len(arrays)), RUNS):
        yield run, found if isinstance(found, str) else error(found)


def _filled(
    model: Model, dtype: str, call: Call, rng: np.random.Generator
) -> tuple[list[Array], list[dict], list[dict]]:
    """Rings that hold random columns at the positions before a call's, and these columns by position and by column."""
    rings = rings_of(model, dtype)
    history: list[dict] = [{} for _ in range(model.slots)]
    columns: list[dict] = [{} for _ in range(model.slots)]
    for slot, first in _next_positions(call).items():
        for position in range(max(0, first - model.ring_len), first):
            sides = rng.standard_normal((2, model.kv_heads, model.dim)).astype(np.float32)
            column = tuple(cache_reference.stored(side, dtype) for side in sides)
            history[slot][position] = columns[slot][position % model.ring_len] = column
            for i, ring in enumerate(rings):
                ring[slot, :, position % model.ring_len] = column[i % 2][i // 2]
    return rings, history, columns


def _next_positions(call: Call) -> dict[int, int]:
    """The first position of each slot that a call has tokens of."""
    first: dict[int, int] = {}
    for slot, row in zip(call.slots, call.positions, strict=True):
        for position in row:
            if position >= 0:
                first[slot] = min(first.get(slot, position), position)
    return first
