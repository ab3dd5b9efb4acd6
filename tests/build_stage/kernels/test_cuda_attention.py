"""The CUDA kernels of attention, in their serial form and on the emulated GPU, against the definition in float64."""

import mmap
from functools import partial
from itertools import pairwise

import numpy as np
import pytest

from build.compiler import tvm
from build.kernels.cuda import attention, decode_attention, decode_pieces, decode_shares, flash_attention
from runtime.artifact.caches import FLOAT8
from runtime.artifact.rotary import QueryScaling
from runtime.errors import UserError
from tests.helpers.attention_reference import (
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
from tests.helpers.kernels import SerialForm, aligned
from tests.helpers.untouched import touched_pages, untouched_memory

NARROW = ("float16", "int8", "uint8")  # caches by the dtype of their numbers; FLOAT8 has a few cases of its own


MIXED = "rows of several slots in any order, some of them drafts, and padding"
TAKEN_BACK = "padded chunks across the wrap, and tokens that were taken back"
SHARED = "shared by six heads, several tiles"
LONG = "chunk longer than the window"
MANY_TILES = "all of many tiles seen by all"
MIXED_CALLS = [
    chunk(2, 0, 16, 16),
    chunk(0, 0, 5, 16),
    step((0, 5), (2, 16), (1, 0), (2, 17)),
    step((2, -1), (1, 1), (0, -1), (0, 6)),
    chunk(2, 18, 16, 16),
    chunk(2, 34, 11, 16),
    # slot 2 wraps at position 40; its drafts come in another order than their rows, beside a first token
    step((2, 47), (0, 7), (2, 45), (2, 46)),
    step((2, 46), (1, 2), (2, 47), (2, 48)),  # the last two drafts were rejected
    chunk(1, 0, 3, 16),  # a slot that another sequence takes over
    step((0, 8), (1, 3), (2, 49), (0, -1)),
]
CASES = {
    "steps across the window and the wrap": (Model(4, 2, 16, 8, 16), [step((0, p)) for p in range(37)]),
    MIXED: (Model(4, 2, 64, 24, 40, slots=3), MIXED_CALLS),
    TAKEN_BACK: (
        Model(4, 2, 64, 24, 48, slots=2),
        [
            chunk(1, 0, 16, 16),
            chunk(1, 16, 9, 16),
            chunk(1, 25, 16, 16),
            chunk(1, 41, 16, 16),
            chunk(1, 40, 16, 16),  # 17 tokens were taken back
            chunk(1, 50, 1, 16),
            chunk(1, 51, 3, 3),
            step((1, 54)),
            step((0, 0)),
        ],
    ),
    LONG: (
        Model(2, 1, 32, 6, 32),
        [chunk(0, 0, 16, 16), chunk(0, 16, 16, 16), chunk(0, 32, 13, 16), step((0, 45))],
    ),
    "one key-value head a head, wide, several tiles": (
        Model(2, 2, 128, 80, 128),
        [*(chunk(0, p, 40, 40) for p in range(0, 200, 40)), step((0, 200))],
    ),
    "a call that is all padding": (
        Model(8, 2, 32, 8, 16, slots=2),
        [chunk(0, 0, 0, 4), step((0, -1)), chunk(1, 0, 3, 4)],
    ),
    "heads wider than a block": (Model(1, 1, 160, 40, 48), [chunk(0, 0, 3, 3), chunk(0, 3, 2, 3), step((0, 5))]),
    SHARED: (
        Model(6, 1, 32, 72, 136, slots=2),
        [
            chunk(0, 0, 60, 60),
            chunk(1, 0, 10, 60),
            step((1, 10), (0, 60)),
            chunk(0, 61, 59, 60),
            chunk(0, 120, 50, 60),
            step((0, 170), (1, 11)),
        ],
    ),
    "full attention up to the last column": (
        Model(4, 2, 32, 48, 48),
        [chunk(0, 0, 16, 16), chunk(0, 16, 16, 16), chunk(0, 32, 14, 16), step((0, 46)), step((0, 47))],
    ),
}
FLASH_CASES = {  # for narrow caches: rows of queries, tiles of 64 columns, and heads of 32 to 128
    **{name: CASES[name] for name in (MIXED, TAKEN_BACK, SHARED, LONG, "a call that is all padding")},
    MANY_TILES: (Model(4, 1, 128, 200, 264), [chunk(0, p, 64, 64) for p in range(0, 320, 64)]),
    "short chunks, wide groups": (Model(8, 1, 96, 70, 80), [chunk(0, 2 * p, 2, 2) for p in range(40)]),
    "few tokens of many": (
        Model(1, 1, 64, 96, 240),
        [chunk(0, 0, 144, 144), chunk(0, 144, 3, 144), chunk(0, 147, 80, 144)],
    ),
}


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, "float32") for case in CASES),
        *((case, dtype) for case in (MIXED, TAKEN_BACK, SHARED) for dtype in NARROW),
        (MIXED, FLOAT8),
    ],
)
def test_rolling_attention(gpu, case, dtype):
    check_attention(gpu, case, dtype)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [*((case, dtype) for case in FLASH_CASES for dtype in NARROW), (MANY_TILES, FLOAT8)],
)
def test_rolling_attention_on_tensor_cores(gpu, case, dtype):
    model, calls = FLASH_CASES[case]
    assert any(flash_attention.suits(model.shape(1, len(call.positions[0]), dtype)) for call in calls)
    check_attention(gpu, case, dtype, FLASH_CASES, tensor_cores=True)


@pytest.mark.parametrize(("dtype", "tensor_cores"), [("float32", False), ("float16", True)])
def test_queries_are_scaled_by_their_position(gpu, dtype, tensor_cores):
    """In all three kernels: one token, several, and several on tensor cores."""
    scaling = QueryScaling(beta=0.25, original_context=7)
    check_attention(gpu, TAKEN_BACK, dtype, tensor_cores=tensor_cores, query_scaling=scaling)


@pytest.mark.parametrize("case", [SHARED, MIXED])
@pytest.mark.parametrize("dtype", NARROW)
def test_a_share_of_several_tiles(gpu, monkeypatch, case, dtype):
    """On a device with fewer multiprocessors than tiles: 72 columns are 3 tiles, 2 for one block and 1 for another."""
    monkeypatch.setattr(decode_shares, "TUNING", decode_shares.DecodeTuning(blocks=4))
    assert decode_shares.splits(CASES[SHARED][0].shape(2, 1)) == 2  # for each half of the six heads
    check_attention(gpu, case, dtype)


def test_shares_do_not_depend_on_the_number_of_rows():
    model = Model(32, 8, 128, 4096, 4224, slots=128)
    assert {decode_shares.splits(model.shape(rows, 1)) for rows in (1, 4, 128)} == {33}


@pytest.mark.parametrize("dtype", ["float32", *NARROW])
def test_a_row_gives_the_same_bits_in_any_step_and_slot(gpu, dtype):
    """Alone in a step of one, among others in one of four, and in another slot after another sequence."""
    model = Model(4, 2, 64, 40, 64, slots=3)
    layer = Layer(gpu, model, dtype)
    rng = np.random.default_rng(3)
    tokens = [layer.token(p, rng) for p in range(100)]
    other = layer.token(0, rng)
    alone = [layer.run([token], [(0, p)]) for p, token in enumerate(tokens)]
    for p in range(60):
        layer.run([other], [(2, p)])  # what another sequence leaves in its slot
    for p in range(0, 100, 2):
        rows = [(1, p), (2, p), (2, p + 1), (1, -1)]
        found = layer.run([other, tokens[p], tokens[p + 1], other], rows)
        np.testing.assert_array_equal(found[1:3], np.concatenate(alone[p : p + 2]))


@pytest.mark.parametrize(("dtype", "tensor_cores"), [("float32", False), ("float16", True), ("int8", True)])
def test_a_token_gives_the_same_bits_wherever_its_chunk_begins(gpu, dtype, tensor_cores):
    model = Model(4, 2, 64, 40, 64, slots=2)
    layer = Layer(gpu, model, dtype, tensor_cores=tensor_cores)
    rng = np.random.default_rng(3)
    tokens = [layer.token(p, rng) for p in range(150)]
    found = []
    for slot, borders in enumerate(([*range(0, 150, 16), 150], [0, 5, 21, 22, 37, 52, 68, 80, 96, 112, 125, 141, 150])):
        parts = [layer.prefill(tokens[a:b], slot, a, 16) for a, b in pairwise(borders)]
        found.append(np.concatenate(parts))
    np.testing.assert_array_equal(*found)
    assert len(np.unique(found[0])) > 1000


@pytest.mark.parametrize(("tokens", "tensor_cores"), [(1, False), (40, False), (40, True)])
def test_only_columns_that_were_written_are_read(tokens, tensor_cores):
    """compute-sanitizer's initcheck reports other reads, although nothing comes of them. 16 columns are a page."""
    model = Model(8, 1, 128, 24, 96)
    kernel = SerialForm().compiled(attention.rolling_attention, model.shape(1, tokens), tensor_cores=tensor_cores)
    rings = [untouched_memory((1, 1, model.ring_len, model.dim), np.float16) for _side in ("keys", "values")]
    assert model.dim * rings[0].itemsize * 16 == mmap.PAGESIZE

    def pages_after(first, count):
        call = chunk(0, first, count, tokens)
        inputs = (np.ones((1, tokens, 10 * 128), np.float32), *angles(np.array(call.positions), 64))
        inputs = map(aligned, (*inputs, np.array(call.positions), np.array(call.slots)))
        kernel(*map(tvm.runtime.from_dlpack, (*inputs, *rings, aligned(output_of(model.shape(1, tokens))))))
        return [touched_pages(ring) for ring in rings]

    assert pages_after(0, 0) == [[]] * 2
    assert pages_after(7, 1) == [[0]] * 2  # on tensor cores, blocks have 8 tokens, and the last one would see 16 to 39
    assert pages_after(16, 1) == [[0, 1]] * 2


class Layer:
    """One layer's kernels and rings, which keep what calls write."""

    def __init__(self, gpu, model, dtype, *, tensor_cores=False):
        self.gpu, self.model, self.dtype, self.tensor_cores = gpu, model, dtype, tensor_cores
        self.rings, self.kernels = rings_of(model, dtype), {}

    def token(self, position, rng):
        """qkv, cos and sin of one token."""
        qkv = rng.standard_normal((1, 1, self.model.shape(1, 1).qkv_dim)).astype(np.float32)
        return qkv, *angles(np.array([[position]]), self.model.dim // 2)

    def run(self, tokens, rows):
        """A step of rows, each a slot and a position; their outputs."""
        return self._call([np.concatenate(parts) for parts in zip(*tokens, strict=True)], step(*rows))[:, 0]

    def prefill(self, tokens, slot, first, size):
        """A chunk; its tokens' outputs."""
        padded = [*tokens, *[tokens[0]] * (size - len(tokens))]
        qkv, cos, sin = zip(*padded, strict=True)
        inputs = [np.concatenate(qkv, axis=1), np.concatenate(cos, axis=2), np.concatenate(sin, axis=2)]
        return self._call(inputs, chunk(slot, first, len(tokens), size))[0, : len(tokens)]

    def _call(self, inputs, call):
        positions = np.array(call.positions)
        shape = self.model.shape(*positions.shape, self.dtype)
        if positions.shape not in self.kernels:
            self.kernels[positions.shape] = kernel_of(self.gpu, shape, tensor_cores=self.tensor_cores)
        *_, out = found = self.gpu.run(
            self.kernels[positions.shape], *inputs, positions, np.array(call.slots), *self.rings, output_of(shape)
        )
        self.rings = found[5:-1]
        return out


@pytest.mark.parametrize(
    ("group", "heads"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 1), (6, 3), (7, 1), (8, 4), (9, 3), (12, 4), (32, 4)]
)
def test_heads_of_a_block(group, heads):
    """At most one for each of its four warps."""
    assert decode_shares.heads_of_block(Model(2 * group, 2, 128, 4096, 4096).shape(1, 1)) == heads


@pytest.mark.parametrize("dtype", ["float32", FLOAT8, *NARROW])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 160, 256])
def test_pieces_hold_every_number_once_and_fit(head_dim, dtype):
    shape = Model(8, 2, head_dim, 4096, 4096).shape(1, 1, dtype)
    pieces, places = decode_pieces.Pieces.of(shape), decode_attention.Places.of(shape)
    found = [pieces.place(piece, i) for piece in range(pieces.count) for i in range(pieces.numbers)]
    assert sorted(found) == list(range(head_dim))
    runs = np.array(found).reshape(-1, pieces.run)
    assert np.array_equal(runs, runs[:, :1] + np.arange(pieces.run))
    columns = [
        (places.column(c, t), t % pieces.count)
        for c in range(places.passes)
        for t in range(places.columns * pieces.count)
        if places.column(c, t) < 32
    ]
    assert sorted(columns) == [(column, piece) for column in range(32) for piece in range(pieces.count)]
    assert decode_attention.shared_bytes(shape) <= 48 * 1024


def test_heads_that_are_too_wide_are_refused():
    with pytest.raises(UserError, match="heads of 1536 numbers do not fit"):
        attention.rolling_attention(Model(2, 1, 1536, 64, 64).shape(1, 1, "float32"))


def test_what_attention_goes_to_tensor_cores():
    def suits(tokens, heads, kv_heads, head_dim, dtype):
        return flash_attention.suits(Model(heads, kv_heads, head_dim, 64, 80).shape(1, tokens, dtype))

    assert [suits(16, 8, 8, 128, "float16"), suits(4, 8, 2, 64, "float16"), suits(16, 8, 8, 64, "int8")] == [True] * 3
    assert suits(16, 8, 8, 64, "uint8")
    assert [suits(15, 8, 8, 128, "float16"), suits(16, 8, 8, 128, "float32")] == [False, False]
    assert [suits(16, 8, 8, 160, "float16"), suits(16, 8, 8, 80, "float16"), suits(1, 32, 1, 64, "float16")] == [
        False,
        False,
        False,
    ]


def check_attention(gpu, case, dtype, cases=CASES, *, tensor_cores=False, query_scaling=None):
    """Compare all calls of a case, one after the other, with the definition.

    Rings hold NaN where nothing was written, as far as their dtype has it.
    """
    model, calls = cases[case]
    rng = np.random.default_rng(7)
    rings = rings_of(model, dtype)
    exact = is_rounded(dtype)
    history = [{} for _ in range(model.slots)]  # position to (rotated key, value), each in the parts of its format
    columns = [{} for _ in range(model.slots)]  # likewise, by the column that was written last
    kernels = {}
    for call in calls:
        positions, slots = np.array(call.positions), np.array(call.slots)
        shape = model.shape(*positions.shape, dtype, query_scaling)
        if positions.shape not in kernels:
            kernels[positions.shape] = kernel_of(gpu, shape, tensor_cores=tensor_cores)
        qkv = rng.standard_normal((*positions.shape, shape.qkv_dim)).astype(np.float32)
        cos, sin = angles(positions, model.dim // 2, rng if exact else None)
        *_, out = after = gpu.run(kernels[positions.shape], qkv, cos, sin, positions, slots, *rings, output_of(shape))
        after = after[5:-1]
        expected = reference(shape, qkv, cos, sin, call, history, columns)
        seen, atol = positions >= 0, tolerance(dtype, exact=exact, tensor_cores=tensor_cores)
        np.testing.assert_allclose(out[seen], expected[seen], rtol=0, atol=atol)
        assert np.isfinite(out).all()
        check_rings(after, rings, columns, exact=exact)
        rings = after


def kernel_of(gpu, shape, *, tensor_cores=False):
    """The compiled kernel."""
    return gpu.compiled(attention.rolling_attention, shape, tensor_cores=tensor_cores)


# Each kernel once. The first two read the rotation's angles at `d % 8`, which LLVM 22's loop vectorizer took for
# sixteen numbers in a row (docs/llvm.md).
OPTIMIZED = {
    "chunk": partial(check_attention, SerialForm(), "a call that is all padding", "float32"),
    "steps": partial(check_attention, SerialForm(), "steps across the window and the wrap", "float32"),
    "chunk on tensor cores": partial(
        check_attention, SerialForm(), "a call that is all padding", "float16", FLASH_CASES, tensor_cores=True
    ),
}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("kernel", OPTIMIZED)
def test_optimized_for_every_width_of_registers(kernel):
    OPTIMIZED[kernel]()
