"""Every CUDA kernel, in its serial form and on the emulated GPU, against numpy in float64."""

import struct
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from tvm.script import tirx as T

from build.kernels.cuda import (
    embedding,
    few_rows,
    gemv,
    linear,
    mixture,
    mma,
    norm,
    pair_weights,
    placed_byte,
    sample,
    swiglu,
    tensor_core,
    tile_ring,
    tiling,
)
from build.kernels.cuda.binding import LARGE_SHARED_BYTES, SERIAL, WARP
from build.kernels.cuda.rounded_rows import Chunks
from build.kernels.shapes import Embedding, Linear
from export.checkpoints.encodings.encoding import EncodedRows
from export.weights.encoded import encoding_of
from export.weights.format import ModelTensor, Storage
from export.weights.panels import to_vector_panels
from export.weights.table import carry, format_of, load, vector_steps
from runtime.decoding.filters import candidates
from runtime.decoding.options import SamplingOptions
from tests.helpers.cuda_products import (
    CARRIED,
    FLOAT32,
    FORMATS,
    INT4,
    NORM_EPS,
    ROUNDED,
    check_tensor_cores,
    check_what_is_fused,
    garbage,
    sizes,
    weights,
)
from tests.helpers.index_bounds import lowered
from tests.helpers.kernels import SerialForm, compiled_serially, packed, run
from tests.helpers.mixture_reference import check as check_mixture

# N and K below, at and beyond a panel (32), a vector (4 to 32) and the 8 warps; rows below, at and beyond a tile of 64.
# The third K goes through the loop without guards, in every format.
ODD = [((1, 1), 70, 61), ((1, 3), 33, 5), ((2, 1), 31, 40), ((5, 14), 45, 37), ((1, 1), 33, 2051)]
EVEN = [
    ((1, 1), 32, 64),
    ((1, 16), 64, 96),
    ((1, 1), 40, 1024),
    ((1, 1), 5, 8192),
    ((1, 7), 65, 40),
    ((1, 1), 32, 2080),
]
LINEAR = [(*s, name) for s in EVEN for name in ROUNDED] + [
    (*s, name) for s in ODD for name in ROUNDED if name not in INT4
]
LINEAR += [(*s, name) for s in (EVEN[2], EVEN[4]) for name in CARRIED]
LINEAR += [(*s, name) for s in (ODD[3], ODD[4]) for name in CARRIED if CARRIED[name].dtype != "int4"]


@pytest.mark.parametrize(("lead", "n", "k", "name"), LINEAR)
def test_linear(gpu, lead, n, k, name):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((*lead, k)).astype(np.float32)
    arrays, wide = weights(rng, n, k, FORMATS[name])
    kernel = gpu.compiled(linear.linear, Linear(lead, n, k, FORMATS[name]))
    *_, y = gpu.run(kernel, x, *arrays, garbage((*lead, n)))
    # K float32 multiplications and additions and a few scalings, each rounded: Higham's bound (K + 4) u sum |x w|, with
    # eps = 2 u; w is as large as what is added up for it.
    magnitude = np.abs(x).astype(np.float64) @ sizes(FORMATS[name], arrays, wide).T
    assert np.all(np.abs(y - x.astype(np.float64) @ wide.T) <= (k + 4) * FLOAT32 * magnitude)


# rows at and beyond 16, 64 and 128, and N and K near tiles of 128 and 256 and a step of 32; int4 in whole groups
TENSOR = [(16, 32, 64), (64, 128, 32), (70, 150, 60), (130, 257, 100)]
TENSOR_CASES = [(*sizes, name) for sizes in TENSOR for name in ("float16", "int8")]
TENSOR_CASES += [(16, 32, 64, "int4"), (70, 150, 64, "int4-zeros"), (130, 257, 96, "int4")]
TENSOR_CASES += [(70, 150, 344, name) for name in CARRIED]  # a last group that is shorter


def tile_with(monkeypatch, tile, splits=1):
    """Let products have such tiles, whatever they are estimated to take."""
    monkeypatch.setattr(tensor_core, "tilings", lambda swiglu, **_: [tiling.Tiling(*tile, splits, 2 if swiglu else 1)])


@pytest.fixture
def large_tiles(monkeypatch):
    """The largest tiles; those of small products would be small."""
    tile_with(monkeypatch, tiling.TILES[0])


@pytest.mark.parametrize("name", ["float16", "int8", "int4", "int8-minimums"])
@pytest.mark.parametrize("rows", [64, 512])
def test_tiles_fill_a_device(rows, name):
    """The blocks of a 7B model's products fill an H200 to at least four fifths, in whole turns."""
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        swiglu = n == 28672
        chosen = tensor_core.best_tiling(FORMATS[name], rows, n // (1 + swiglu), k, swiglu=swiglu)
        blocks = chosen.blocks(rows, n // (1 + swiglu))
        assert blocks >= 0.8 * tiling.MULTIPROCESSORS * -(-blocks // tiling.MULTIPROCESSORS)
        assert tile_ring.Ring.of(FORMATS[name], chosen).bytes <= LARGE_SHARED_BYTES


# Each tile, with K in one part or in several.
TILED = [(tile, splits) for tile, splits in zip(tiling.TILES, (1, 2, 3, 1, 2, 1, 3), strict=True)]


@pytest.mark.parametrize(
    ("tiled", "rows", "n", "k", "name"), [(TILED[i % len(TILED)], *case) for i, case in enumerate(TENSOR_CASES)]
)
def test_tensor_cores(gpu, monkeypatch, tiled, rows, n, k, name):
    tile, splits = tiled
    tile_with(monkeypatch, tile, splits)
    check_tensor_cores(gpu, rows, n, k if splits == 1 else k + 640, name)


# rows of one and of two products of 8, N and K that fill no panel, vector or chunk, more K than the warps load at once
FEW_ROWS = [((2, 1), 70, 72), ((8, 1), 32, 2080), ((3, 1), 40, 1312), ((15, 1), 33, 352)]
FEW_ROWS_CASES = [(*FEW_ROWS[i % 4], name) for name in FORMATS if name != "float32" for i in (1, 2)]
FEW_ROWS_CASES += [(*FEW_ROWS[i], name) for name in ("float16", "int8", "float8", "int8-zeros") for i in (0, 3)]
FEW_ROWS_CASES += [(*FEW_ROWS[3], name) for name in INT4]


@pytest.mark.parametrize(("lead", "n", "k", "name"), FEW_ROWS_CASES)
def test_few_rows(gpu, lead, n, k, name):
    assert few_rows.suits(Linear(lead, n, k, FORMATS[name]))
    check_tensor_cores(gpu, lead[0], n, k, name)


@pytest.mark.parametrize(("rows", "name"), [(2, "float16"), (9, "int8"), (8, "int4-zeros")])
def test_several_panels_in_a_block(gpu, monkeypatch, rows, name):
    """As for many outputs: three panels are two for one block, and one for another."""
    monkeypatch.setattr(few_rows, "WIDE", 1)
    shape = Linear((rows, 1), 70, 352, FORMATS[name])
    blocks = few_rows.Blocks.of(shape, Chunks.of(shape.weight, shape.k))
    assert (blocks.panels, blocks.count) == (2, 2)
    check_tensor_cores(gpu, rows, shape.n, shape.k, name)


@pytest.mark.parametrize("name", ["float16", "int8", "int4-zeros", "int4-minimums", "float8-groups"])
def test_a_row_has_the_same_bits_in_any_company(gpu, name):
    """Beside other rows, in another place, and in a step of another number of rows."""
    rng, n, k = np.random.default_rng(7), 40, 2080
    arrays, _ = weights(rng, n, k, FORMATS[name])
    x = rng.standard_normal((15, 1, k)).astype(np.float32)

    def rows(chosen):
        shape = Linear((len(chosen), 1), n, k, FORMATS[name])
        kernel = gpu.compiled(linear.linear, shape, tensor_cores=True)
        return gpu.run(kernel, x[chosen], *arrays, garbage((len(chosen), 1, n)))[-1]

    together = rows(list(range(15)))
    np.testing.assert_array_equal(rows([4, 11]), together[[4, 11]])
    np.testing.assert_array_equal(rows([9, 3, 14, 0, 2, 1, 11, 4])[[7, 1]], together[[4, 3]])


def test_a_byte_is_placed_by_one_instruction():
    """By the definition of `__byte_perm(x, y, selector)`, which the serial form does without.

    Byte i of the result is the one that digit i of the selector says, of the eight bytes of y and x.
    """
    word, rest, eight = 0x89ABCDEF, 0x11223344, np.frombuffer(struct.pack("<II", 0x89ABCDEF, 0x11223344), np.uint8)
    for byte, target in np.ndindex(4, 4):
        digits = [placed_byte.selector(int(byte), target) >> 4 * i & 0xF for i in range(4)]
        expected = [word >> 8 * byte & 0xFF if i == target else rest >> 8 * i & 0xFF for i in range(4)]
        assert eight[digits].tolist() == expected


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "float32"])
def test_pairs_hold_every_step_once(name):
    steps = vector_steps(FORMATS[name])
    found = [step for i in range(steps // 2) for step in pair_weights.pair_steps(FORMATS[name], i)]
    assert sorted(found) == list(range(steps))


# One row, one of several tokens, several rows in float32, and rows for tensor cores; widths that fill panels (which
# SwiGLU needs) and widths that do not; a K that leaves no room for a normed x in a block.
FUSED = {
    "norm": (Linear((1, 1), 70, 96, FORMATS["float16"], norm_eps=NORM_EPS), False),
    "norm, int4": (Linear((1, 1), 40, 2080, FORMATS["int4-zeros"], norm_eps=NORM_EPS), False),
    "norm, wide": (Linear((1, 1), 33, 12288, FORMATS["int8"], norm_eps=NORM_EPS), False),
    "norm, one token": (Linear((1, 1), 70, 96, FORMATS["int8"], one_of=5, norm_eps=NORM_EPS), False),
    "norm, one token, wide": (Linear((1, 1), 33, 12288, FORMATS["float16"], one_of=5, norm_eps=NORM_EPS), False),
    "one token": (Linear((1, 1), 70, 96, FORMATS["int4"], one_of=5), False),
    "order, one token": (Linear((1, 1), 40, 2080, FORMATS["int4-order"], one_of=5), False),
    "norm and SwiGLU": (Linear((1, 1), 128, 96, FORMATS["float16"], norm_eps=NORM_EPS, swiglu=True), False),
    "norm, order": (Linear((1, 1), 40, 2080, FORMATS["int4-order"], norm_eps=NORM_EPS), False),
    "norm, order, rows": (Linear((1, 9), 40, 136, FORMATS["int4-order"], norm_eps=NORM_EPS), False),
    "order, wide": (Linear((1, 1), 33, 12288, FORMATS["int8-order"]), False),
    "sums, wide": (Linear((1, 1), 33, 36864, FORMATS["int8-zeros"]), False),
    "norm and SwiGLU, int4": (Linear((1, 1), 192, 64, FORMATS["int4"], norm_eps=NORM_EPS, swiglu=True), False),
    "SwiGLU, int8": (Linear((1, 1), 64, 1024, FORMATS["int8"], swiglu=True), False),
    "residual": (Linear((1, 1), 70, 40, FORMATS["int8"], residual=True), False),
    "norm and SwiGLU, rows": (Linear((2, 9), 64, 40, FORMATS["int8"], norm_eps=NORM_EPS, swiglu=True), False),
    "residual, rows": (Linear((1, 18), 33, 40, FORMATS["float16"], residual=True), False),
    "norm, SwiGLU and order, tensor cores": (
        Linear((1, 70), 320, 136, FORMATS["int4-order"], norm_eps=NORM_EPS, swiglu=True),
        True,
    ),
    "order, tensor cores": (Linear((16, 1), 64, 64, FORMATS["int8-order"]), True),
    "norm and SwiGLU, tensor cores": (Linear((1, 70), 320, 64, FORMATS["int8"], norm_eps=NORM_EPS, swiglu=True), True),
    "SwiGLU, tensor cores, float16": (Linear((1, 130), 448, 40, FORMATS["float16"], swiglu=True), True),
    "norm, SwiGLU and order, few rows": (
        Linear((5, 1), 128, 136, FORMATS["int4-order"], norm_eps=NORM_EPS, swiglu=True),
        True,
    ),
    "norm, few rows": (Linear((2, 1), 70, 4096, FORMATS["int8"], norm_eps=NORM_EPS), True),
    "residual, few rows": (Linear((11, 1), 33, 2048, FORMATS["float16"], residual=True), True),
    "SwiGLU, few rows": (Linear((8, 1), 192, 1024, FORMATS["float8"], swiglu=True), True),
    "residual, tensor cores": (Linear((1, 16), 150, 64, FORMATS["int4"], residual=True), True),
    "residual, tensor cores, float16": (Linear((1, 16), 151, 72, FORMATS["float16"], residual=True), True),
}


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_with_a_product(gpu, name):
    check_what_is_fused(gpu, *FUSED[name])


@pytest.mark.parametrize("name", ["residual, tensor cores, float16", "SwiGLU, tensor cores, float16"])
def test_what_is_fused_with_parts_of_a_product(gpu, monkeypatch, name):
    tile_with(monkeypatch, tiling.TILES[4], splits=2)
    check_what_is_fused(gpu, *FUSED[name])


def test_what_leaves_room_for_a_norm():
    """12288 floats fill a block's 48 kB; int4 has sums of x besides. Without a norm, only these sums need room."""
    plain = [gemv.fits(Linear((1, 1), 64, k, FORMATS["int8-zeros"])) for k in (28672, 36864)]
    assert plain == [True, False]
    found = {
        name: [gemv.fits(Linear((1, 1), 64, k, FORMATS[name], norm_eps=NORM_EPS)) for k in (4096, 8192, 12288)]
        for name in ("float16", "int4")
    }
    assert found == {"float16": [True, True, False], "int4": [True, False, False]}


@pytest.mark.parametrize("name", ["float16", "int8", "int4-minimums"])
def test_shared_memory_is_read_and_written_in_different_banks(name):
    """Eight lanes at a time, each 16 bytes, of which 128 bytes have a bank each."""
    ring = tile_ring.Ring.of(FORMATS[name], tiling.Tiling(*tiling.TILES[0]))
    by_lanes = {
        "reads of x": [ring.row_unit(1, row, word) for word in range(4) for row in range(WARP)],
        "copies of x": [ring.row_unit(1, unit // 4, unit % 4) for unit in range(ring.row_units)],
        "reads of W": [ring.weight_unit(1, 1, t % 4, 8 * piece + t // 4) for piece in range(4) for t in range(WARP)],
        "copies of W": [ring.weight_unit(1, 1, v, column) for v in range(4) for column in range(WARP)],
    }
    for what, units in by_lanes.items():
        banks = np.reshape(units, (-1, 8)) % 8
        assert np.all(np.sort(banks) == range(8)), what


def test_shared_memory_is_allocated_whole():
    """TVM allocates what it sees being used; it sees no more of an asynchronous copy than where that begins."""
    shape = Linear((1, 64), 1024, 1024, FORMATS["int8-minimums"])
    ring = tile_ring.Ring.of(shape.weight, tensor_core.best_tiling(shape.weight, shape.rows, shape.n, shape.k))
    launches = "".join(str(part) for part in lowered(linear.linear(shape, tensor_cores=True), "cuda"))
    assert f'T.alloc_buffer(({ring.bytes // 4},), "uint32", scope="shared.dyn"' in launches


def test_matrices_are_loaded_as_the_ptx_manual_says():
    """The manual's formula for ldmatrix: number i of a lane in matrix m is in row lane / 4, column lane % 4 * 2 + i."""
    tile = np.arange(4 * 8 * 8, dtype=np.float16).reshape(4, 8, 8)

    @T.prim_func
    def warp(tile: T.Buffer((32, 4), "uint32"), a: T.Buffer((32, 4), "uint32")):
        for t in T.serial(32):
            mma.matrix_loader(SERIAL)(tile, eight_rows_each, a, t, 0)

    *_, a = run(compiled_serially(warp), tile.view(np.uint32).reshape(32, 4), np.zeros((32, 4), np.uint32))
    for lane in range(32):
        for m in range(4):
            expected = [tile[m, lane // 4, lane % 4 * 2 + i] for i in range(2)]
            assert a[lane, m : m + 1].view(np.float16).tolist() == expected


def eight_rows_each(matrix, row):
    return matrix * 8 + row


def test_fragments_lie_as_the_ptx_manual_says():
    """One product computed only from the manual's formulas for mma.m16n8k16, which the serial form inverts.

    The formulas lead from lane and index to row and column.
    """
    rng = np.random.default_rng(0)
    x, w = rng.integers(-8, 9, (16, 16)), rng.integers(-8, 9, (16, 8))
    a, b = np.zeros((32, 4, 2), np.float16), np.zeros((32, 2, 2), np.float16)
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(8):
            row = group if i < 2 or 4 <= i < 6 else group + 8
            column = thread * 2 + (i & 1) + (8 if i >= 4 else 0)
            a[lane, i // 2, i % 2] = x[row, column]
        for i in range(4):
            b[lane, i // 2, i % 2] = w[thread * 2 + (i & 1) + (8 if i >= 2 else 0), group]

    @T.prim_func
    def warp(a: T.Buffer((32, 4), "uint32"), b: T.Buffer((32, 2), "uint32"), acc: T.Buffer((32, 4), "float32")):
        for t in T.serial(32):
            mma.multiply_serially(acc, a, b, t, 0, 0, 0)

    *_, acc = run(
        compiled_serially(warp), a.view(np.uint32)[..., 0], b.view(np.uint32)[..., 0], np.ones((32, 4), np.float32)
    )
    expected = x @ w + 1
    for lane in range(32):
        group, thread = lane >> 2, lane % 4
        for i in range(4):
            assert acc[lane, i] == expected[group if i < 2 else group + 8, thread * 2 + (i & 1)]


@pytest.mark.parametrize(
    ("rows", "k", "name", "suits"),
    [
        (16, 64, "float16", True),
        (15, 64, "float16", False),
        (16, 62, "int8", True),
        (16, 64, "int4", True),
        (64, 64, "float32", False),
    ],
)
def test_what_goes_to_tensor_cores(rows, k, name, suits):
    assert tensor_core.suits(Linear((1, rows), 32, k, FORMATS[name])) == suits


EXACT = [(name, k) for name in ROUNDED for k in (2048, 8192, 8224)]
EXACT += [(name, 8224) for name in CARRIED]


@pytest.mark.parametrize(("name", "k"), EXACT)
def test_large_products_of_small_whole_numbers_are_exact(gpu, name, k):
    """Every sum is a whole number of quarters (for int4, of their sixteenths) below 2**24.

    So a vector that is left out or taken twice cannot hide behind a bound.
    """
    rng, n, stored = np.random.default_rng(k), 40, FORMATS[name]
    tensor = ModelTensor(name="w", shape=(n, k), stored=stored)
    x, w = rng.integers(-4, 5, (1, 1, k)).astype(np.float32), rng.integers(0, 16, (n, k))
    kernel = gpu.compiled(linear.linear, Linear((1, 1), n, k, stored))
    arrays = carry(tensor, whole(rng, stored, w)) if format_of(stored).scaled else {"w": w.astype(stored.dtype)}
    expected = x[0, 0].astype(np.float64) @ load(tensor, arrays).astype(np.float64).T
    *_, y = gpu.run(kernel, x, *packed(tensor, arrays, "cuda"), garbage((1, 1, n)))
    np.testing.assert_array_equal(y[0, 0], expected)


def whole(rng, stored, w):
    """Whole numbers from 0 to 15 as the rows of a storage, with scales of 1/4 and offsets that are multiples of it."""
    encoding = encoding_of(stored)
    groups = (len(w), encoding.groups(w.shape[1]))
    dtype = {"int4": np.uint8, "int8": np.int8, "float8": ml_dtypes.float8_e4m3fn}[stored.dtype]
    numbers = w.astype(dtype)
    offsets = {
        "none": lambda: None,
        "zero_points": lambda: rng.integers(0, 16, groups).astype(dtype),
        "minimums": lambda: (rng.integers(-32, 0, groups) / 4).astype(encoding.scales),
    }[stored.offsets]()
    order = rng.permutation(w.shape[1]).astype(np.int32) if stored.reordered else None
    numbers = numbers.view(np.uint8) if stored.dtype == "float8" else numbers
    return EncodedRows(numbers, np.full(groups, 0.25, encoding.scales), offsets, order)


def test_every_float8_is_read_exactly(gpu):
    """All finite numbers, subnormal ones among them, times one scale each."""
    stored, bits = Storage(dtype="float8"), np.array([b for b in range(256) if b & 127 != 127], np.uint8)
    tensor = ModelTensor(name="w", shape=(1, len(bits)), stored=stored)
    arrays = carry(tensor, EncodedRows(bits[None], np.full((1, 1), 0.3, np.float32)))
    kernel = gpu.compiled(embedding.embedding, Embedding((1, 1), 1, len(bits), stored))
    *_, y = gpu.run(kernel, np.zeros((1, 1), np.int64), *packed(tensor, arrays, "cuda"), garbage((1, 1, len(bits))))
    np.testing.assert_array_equal(y[0, 0], bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(0.3))


BLOCKS = [(4096, 512, 16), (28672, 512, 8), (1024, 512, 32), (576, 72, 32), (64, 8, 8), (64, 16, 16), (64, 40, 32)]


@pytest.mark.parametrize(("n", "k", "warps"), BLOCKS)
def test_small_matrices_are_split_more(n, k, warps):
    """`k` is in vectors."""
    assert gemv.gemv_warps(-(-n // 32), k) == warps


EMBEDDING = [((1, 1), 64, name) for name in ROUNDED] + [((2, 3), 296, name) for name in FORMATS]


@pytest.mark.parametrize(("lead", "k", "name"), EMBEDDING)
def test_embedding_is_exact(gpu, lead, k, name):
    """Except that a minimum may be added to a product before that is rounded."""
    rng = np.random.default_rng(k)
    arrays, wide = weights(rng, 77, k, FORMATS[name])
    ids = rng.integers(0, 77, lead)
    ids.flat[0] = 76  # in the padded last panel
    kernel = gpu.compiled(embedding.embedding, Embedding(lead, 77, k, FORMATS[name]))
    *_, y = gpu.run(kernel, ids, *arrays, garbage((*lead, k)))
    stored = FORMATS[name]
    bound = FLOAT32 * sizes(stored, arrays, wide)[ids] if stored.minimums else 0
    assert np.all(np.abs(y - wide[ids]) <= bound)


@pytest.mark.parametrize(("lead", "dim"), [((1, 1), 64), ((2, 3), 576), ((1, 16), 100)])
def test_rms_norm(gpu, lead, dim):
    rng = np.random.default_rng(dim)
    x, gain = rng.standard_normal((*lead, dim)).astype(np.float32), rng.uniform(0.5, 1.5, dim).astype(np.float32)
    *_, y = gpu.run(gpu.compiled(norm.rms_norm, lead, dim, 1e-5), x, gain, garbage((*lead, dim)))
    wide = x.astype(np.float64)
    expected = wide / np.sqrt(np.mean(wide**2, -1, keepdims=True) + np.float32(1e-5)) * gain
    # the sum's relative error is at most (dim + 1) u, halved by the root; six more roundings follow
    np.testing.assert_allclose(y, expected, rtol=(dim / 4 + 4) * FLOAT32)


@pytest.mark.parametrize(("lead", "hidden_dim"), [((1, 1), 96), ((2, 3), 300), ((1, 16), 256)])
def test_swiglu(gpu, lead, hidden_dim):
    both = np.random.default_rng(hidden_dim).uniform(-20, 20, (*lead, 2 * hidden_dim)).astype(np.float32)
    _, y = gpu.run(gpu.compiled(swiglu.swiglu, lead, hidden_dim), both, garbage((*lead, hidden_dim)))
    gate, up = both[..., :hidden_dim].astype(np.float64), both[..., hidden_dim:].astype(np.float64)
    # exp to 2 ulp (CUDA's and the C library's bound), then an addition, a division and a multiplication
    np.testing.assert_allclose(y, gate / (1 + np.exp(-gate)) * up, rtol=4 * FLOAT32)


# One token and several, sizes that are and are not multiples of a panel, more tokens than a tile has rows, and an
# expert that no token chooses.
@pytest.mark.parametrize(
    ("tokens", "dim", "hidden_dim", "dtype"),
    [(1, 64, 96, "int8"), (1, 33, 7, "float32"), (5, 40, 33, "float16"), (70, 64, 48, "int8")],
)
def test_mixture(gpu, tokens, dim, hidden_dim, dtype):
    check_mixture(
        lambda shape, arrays: gpu.run(gpu.compiled(mixture.mixture, shape), *arrays),
        tokens,
        dim,
        hidden_dim,
        dtype,
        to_vector_panels,
    )


# tiles with rows for all, some and no pairs; N near a tile of 128
@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize(("tokens", "dim", "hidden_dim", "dtype"), [(16, 64, 48, "float16"), (70, 72, 100, "int8")])
def test_mixture_on_tensor_cores(gpu, tokens, dim, hidden_dim, dtype):
    def make_and_run(shape, arrays):
        return gpu.run(gpu.compiled(mixture.mixture, shape, tensor_cores=True), *arrays)

    check_mixture(make_and_run, tokens, dim, hidden_dim, dtype, to_vector_panels, rounds=True)


SAMPLING = [(1.0, 1), (0.7, 5), (1.3, 40), (1.0, 0), (0.9, 10**4)]  # temperature and top-k; greedy is a top-k of 1


@pytest.mark.parametrize("vocab_size", [52, 3001])  # ids in vectors; and one thread with fewer ids than the others
def test_sample_draws_as_the_host_does(gpu, vocab_size):
    """Compare with `runtime.decoding.filters`'s filters on the same draw; every third time, some logits are equal."""
    kernel, rng = gpu.compiled(sample.sample, vocab_size), np.random.default_rng(vocab_size)
    for temperature, top_k in SAMPLING:
        options = SamplingOptions(temperature=temperature, top_k=top_k or None)
        for turn in range(30):
            logits = (3 * rng.standard_normal(vocab_size)).astype(np.float32)
            logits = np.round(logits) if turn % 3 == 0 else logits
            draw = np.float32(0 if top_k == 1 else rng.random())
            arrays = (
                logits.reshape(1, 1, -1),
                np.array([temperature, top_k, draw], np.float32),
                np.array([[3]]),
                np.array([[7]]),
                np.array([9]),
            )
            *_, ids, positions, token = gpu.run(kernel, *arrays)
            kept, weights_of_kept = candidates(logits.astype(np.float64), options)
            mass = np.cumsum(weights_of_kept)
            expected = kept[np.searchsorted(mass, draw * mass[-1], side="right")]
            assert (token[0], ids[0, 0], positions[0, 0]) == (expected, expected, 8)


@pytest.mark.parametrize("vocab_size", [10, 1025])  # of 1025, threads have two each, and the last one
def test_the_largest_draw_takes_the_last_candidate(gpu, vocab_size):
    """The draw is one that float32 has rounded up to one."""
    logits = np.resize(np.array([1, 3, 2, 3, 0], np.float32), vocab_size)
    kernel = gpu.compiled(sample.sample, vocab_size)
    for top_k, last in ((0, vocab_size - 1), (4, vocab_size - 2)):
        found = gpu.run(
            kernel,
            logits.reshape(1, 1, -1),
            np.array([1, top_k, 1], np.float32),
            np.zeros((1, 1), int),
            np.zeros((1, 1), int),
            np.array([9]),
        )
        assert found[-1][0] == last


@pytest.mark.parametrize("wrong", [np.nan, -np.nan, np.inf, -np.inf])
def test_sample_tells_of_what_is_no_number(gpu, wrong):
    logits = np.zeros((1, 1, 40), np.float32)
    logits[..., 33] = wrong
    arrays = (logits, np.array([1, 1, 0], np.float32), np.array([[3]]), np.array([[7]]), np.array([9]))
    *_, ids, _, token = gpu.run(gpu.compiled(sample.sample, 40), *arrays)
    assert (token[0], ids[0, 0]) == (-1, 0)


# Each kind of kernel once; attention is in `test_cuda_attention.py`.
OPTIMIZED = {
    "product with one row": partial(test_linear, SerialForm(), (1, 1), 33, 64, "int4-zeros"),
    "product with rows": partial(test_linear, SerialForm(), (5, 14), 45, 37, "int8"),
    "product on tensor cores": partial(check_tensor_cores, SerialForm(), 16, 32, 64, "int4"),
    "embedding": partial(test_embedding_is_exact, SerialForm(), (2, 3), 64, "int4-zeros"),
    "norm": partial(test_rms_norm, SerialForm(), (1, 16), 100),
    "swiglu": partial(test_swiglu, SerialForm(), (2, 3), 300),
    "mixture": partial(test_mixture, SerialForm(), 5, 40, 33, "float16"),
    "sampler": partial(test_sample_draws_as_the_host_does, SerialForm(), 50),
}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kernel", OPTIMIZED)
def test_optimized_for_every_width_of_registers(kernel):
    OPTIMIZED[kernel]()
