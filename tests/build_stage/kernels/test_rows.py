"""A row of a product has the same bits whichever rows are computed with it, on every level and in every format."""

from dataclasses import replace

import numpy as np
import pytest

from build.kernels.cpu.level import LEVELS
from build.kernels.cpu.linear import linear
from build.kernels.cpu.mixture import mixture
from build.kernels.shapes import Linear, Mixture
from export.weights.format import Storage
from export.weights.panels import to_panels
from tests.helpers.cpu_products import (
    DYNAMIC,
    FORMATS,
    FUSED,
    call,
    output,
    processor_of,
    product,
    skip_unless_runnable,
)
from tests.helpers.kernels import aligned, compiled
from tests.helpers.mixture_reference import EXPERTS, PER_TOKEN, stacked_weight

ROWS = 40  # more than FEW_TILES, on every level
# By turns, because each takes a kernel: fewer rows than a tile has, a tile or a few, and many; 5 and 40 leave tiles
# that are not full on some level.
COUNTS = (2, 5, 16, ROWS)
BY_LEVEL = {level.name: level for level in LEVELS}
# All formats that are rounded to, and those of checkpoints on two levels, whose registers differ.
PRODUCTS = [
    (name, level.name, rounded)
    for level in LEVELS
    for rounded, formats in ((False, FORMATS), (True, DYNAMIC))
    for name in formats
    if level.name not in ("amx", "avx512-bf16")  # see TILED and `test_bfloat16.py`; the rest is that of avx512-vnni
    if (level.dots or not rounded) and (level.name in ("avx512-vnni", "avx2") or not name.startswith("carried"))
    # their floats are those of avx512 and avx2
    if rounded or level.name not in ("avx512-vnni", "avx-vnni") or name.startswith("carried")
]
# Rows, N and K of products in tiles of AMX, and what is fused around them. K ends within a tile, or weights are read
# as they lie; blocks of one, two or four tiles, and one that is not full; one tile of rows, two, and four; offsets of
# every kind.
TILED = [
    ("int8", 40, 45, 328, "norm, residual"),
    ("int8", 40, 128, 256, "norm, swiglu"),
    ("int8 of 16 bits", 40, 64, 192, "alone"),
    ("int4-32", 33, 45, 328, "norm, residual"),
    ("int4-32", 16, 64, 256, "alone"),
    ("int4-128-zero-points", 40, 45, 384, "norm, residual"),
    ("carried int4 minimums", 17, 45, 320, "alone"),
    ("carried int4 float32 minimums", 40, 45, 328, "alone"),
    ("carried int4 reordered", 16, 45, 320, "alone"),
    ("carried int8 zero points", 40, 45, 328, "alone"),
    ("carried int8 minimums", 16, 45, 320, "alone"),
]


def format_name(stored):
    return stored.dtype if not stored.rounds else f"{stored.dtype}, {stored.rounding} activations"


def check_rows(level, shape, count):
    """Compare the rows of a product of `count` rows with those of one row at a time, bit for bit."""
    skip_unless_runnable(level)
    made = product(shape)
    last = len(made.arrays) - 1

    def computed(kernel, start, count):
        taken = [
            array[:, start : start + count] if i == 0 or (i == last and shape.residual) else array
            for i, array in enumerate(made.arrays)
        ]
        y = output(1, count, shape.n_out)
        call(kernel, *taken, y)
        return y[0]

    def kernel_of(count):
        return compiled(linear(level, replace(shape, lead=(1, count))), processor_of(level))

    single = kernel_of(1)
    alone = np.concatenate([computed(single, row, 1) for row in range(count)])
    assert np.array_equal(computed(kernel_of(count), 0, count).view(np.uint32), alone.view(np.uint32))


@pytest.mark.parametrize(("name", "level", "rounded"), PRODUCTS)
def test_rows_of_products_do_not_depend_on_each_other(name, level, rounded):
    """Sizes are multiples of no panel, block or group."""
    count = COUNTS[PRODUCTS.index((name, level, rounded)) % len(COUNTS)]
    stored = (DYNAMIC if rounded else FORMATS)[name]
    check_rows(BY_LEVEL[level], Linear((1, ROWS), 45, 328, stored, **FUSED["norm, residual"]), count)


@pytest.mark.parametrize(("name", "count", "n", "k", "fused"), TILED)
def test_rows_in_tiles_are_those_of_dots(name, count, n, k, fused):
    """One row is multiplied by dots, whose results `test_cpu.py` proves."""
    check_rows(BY_LEVEL["amx"], Linear((1, ROWS), n, k, DYNAMIC[name], **FUSED[fused]), count)


@pytest.mark.parametrize("level", ["avx512-vnni", "avx2"])
@pytest.mark.parametrize("stored", [FORMATS["int8"], FORMATS["float16"], DYNAMIC["int8"]], ids=format_name)
def test_rows_do_not_depend_on_each_other_where_k_is_odd(stored, level):
    check_rows(BY_LEVEL[level], Linear((1, ROWS), 31, 331, stored), 5)


@pytest.mark.parametrize("level", ["avx512-vnni", "avx2"])
@pytest.mark.parametrize("stored", [FORMATS["int8"], FORMATS["float32"], DYNAMIC["int8"]], ids=format_name)
def test_rows_of_gates_do_not_depend_on_each_other(stored, level):
    check_rows(BY_LEVEL[level], Linear((1, ROWS), 64, 256, stored, **FUSED["norm, swiglu"]), 16)


@pytest.mark.parametrize(("dtype", "tokens"), [("float32", 5), ("float16", 40), ("int8", 2), ("int8", 16)])
@pytest.mark.parametrize("level", ["avx512", "avx2", "any"])
def test_rows_of_mixtures_do_not_depend_on_each_other(level, dtype, tokens):
    dim, hidden_dim = 40, 36
    rng = np.random.default_rng(tokens)
    x = rng.standard_normal((1, tokens, dim)).astype(np.float32)
    scores = rng.standard_normal((1, tokens, EXPERTS)).astype(np.float32)
    weights = []
    for n, k in ((2 * hidden_dim, dim), (dim, hidden_dim)):
        weight, scale = stacked_weight(rng, n, k, dtype)
        weights += [np.concatenate([to_panels(matrix) for matrix in weight]), *([] if scale is None else [scale])]

    def computed(count, starts):
        shape = Mixture((1, count), dim, hidden_dim, EXPERTS, PER_TOKEN, Storage(dtype=dtype))
        kernel = compiled(mixture(BY_LEVEL[level], shape), processor_of(BY_LEVEL[level]))
        found = []
        for start in starts:
            y, scratch = output(1, count, dim), [aligned(np.zeros(size, kind)) for size, kind in shape.scratch]
            rows = slice(start, start + count)
            call(kernel, x[:, rows], scores[:, rows], *weights, y, *scratch)
            found.append(y[0])
        return np.concatenate(found)

    together, alone = computed(tokens, [0]), computed(1, range(tokens))
    assert np.array_equal(together.view(np.uint32), alone.view(np.uint32))
