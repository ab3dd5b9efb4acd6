"""What model and shape imply: how long rings are, and what graphs and compiled functions take and return."""

import msgspec
import pytest

from runtime.artifact.caches import RING_BLOCK
from runtime.artifact.manifest import COLUMN, IDS, POSITIONS, SLOTS, Shape
from runtime.artifact.signatures import ACTIVATION_LIMIT, functions_of, graphs_of, size_problems
from tests.helpers.ring_engine import VOCAB, model_with

SHAPE = Shape(slots=3, step_rows=(1, 4), prefill_chunks=(8, 2), cache_len=40)


@pytest.mark.parametrize(
    ("windows", "cache_len", "longest_call", "expected"),
    [
        ((8,), 40, 1, (16,)),  # one token more than seven before it
        ((16,), 40, 1, (16,)),
        ((16,), 40, 2, (32,)),  # the second of two would overwrite what the first one sees
        ((8,), 40, 9, (16,)),
        ((8,), 40, 10, (32,)),
        ((8, 4096), 40, 128, (144, 4224)),  # windows alone: a text may be of any length
        ((None,), 40, 16, (48,)),  # never wraps
        ((8, None), 40, 16, (32, 48)),
        ((8, None), 20, 16, (32, 32)),  # 23 columns would do more than 20 positions ever fill
        ((30, None), 40, 16, (48, 48)),
        ((4096, None), 40, 16, (48, 48)),
    ],
)
def test_rings_hold_a_window_and_one_call_in_whole_blocks(windows, cache_len, longest_call, expected):
    assert model_with(windows).ring_lens(cache_len, longest_call) == expected


@pytest.mark.parametrize("windows", [(8,), (5, 20), (8, None), (None,)])
@pytest.mark.parametrize("longest_call", [1, 2, 9, 16])
def test_no_call_overwrites_what_its_rows_see(windows, longest_call):
    """Nor is a ring longer than that by a block, or than all positions."""
    model = model_with(windows)
    most = 40 if None in windows else 10**9
    for ring, window in zip(model.ring_lens(40, longest_call), model.cache_lens(40), strict=True):
        oldest_seen = window - 1  # before the first of the call's tokens
        newest = longest_call - 1  # after it
        assert ring % RING_BLOCK == 0
        assert ring > oldest_seen + newest or ring >= most
        assert ring - RING_BLOCK < min(oldest_seen + newest + 1, most)


def test_a_function_takes_rows_of_slots_and_the_rings_of_all():
    functions = {function.name: function for function in functions_of(model_with((8, None)), SHAPE, "float32")}
    assert list(functions) == ["prefill_8", "prefill_2", "step_1", "step_4"]
    assert [(function.rows, function.tokens) for function in functions.values()] == [(1, 8), (1, 2), (1, 1), (4, 1)]

    def call(name):
        return [(spec.name, spec.shape, spec.dtype) for spec in functions[name].signature.call]

    assert call("prefill_8") == [
        (IDS, (1, 8), "int64"),
        (POSITIONS, (1, 8), "int64"),
        (SLOTS, (1,), "int64"),
        (COLUMN, (1,), "int64"),
    ]
    assert call("step_4") == [(IDS, (4, 1), "int64"), (POSITIONS, (4, 1), "int64"), (SLOTS, (4,), "int64")]
    rings = [(spec.name.split(".", 1)[1], spec.shape) for spec in functions["step_1"].signature.caches]
    assert rings == [
        ("0.key", (3, 1, 16, 4)),
        ("0.value", (3, 1, 16, 4)),
        ("1.key", (3, 1, 48, 4)),
        ("1.value", (3, 1, 48, 4)),
    ]
    assert all(function.signature.caches == functions["step_1"].signature.caches for function in functions.values())
    assert [[spec.shape for spec in function.signature.outputs] for function in functions.values()] == [
        [(1, 1, VOCAB)],
        [(1, 1, VOCAB)],
        [(1, 1, VOCAB)],
        [(4, 1, VOCAB)],
    ]


def test_graphs_have_the_names_of_functions_and_caches_of_their_own_rows():
    model = model_with((8, None))
    graphs = graphs_of(model, SHAPE, "float32")
    assert [(graph.name, graph.rows, graph.tokens) for graph in graphs] == [
        (function.name, function.rows, function.tokens) for function in functions_of(model, SHAPE, "float32")
    ]
    for graph in graphs:
        assert [spec.name for spec in graph.signature.call] == [IDS, POSITIONS]
        shapes = [spec.shape for spec in graph.signature.caches]
        assert shapes == [(graph.rows, 1, 8, 4)] * 2 + [(graph.rows, 1, 40, 4)] * 2
        assert [spec.shape for spec in graph.signature.outputs[1:]] == shapes


def test_a_head_of_every_token_picks_no_column_and_takes_no_steps():
    model = msgspec.structs.replace(model_with((8,)), head="embedding")
    functions = functions_of(model, SHAPE, "float32")
    assert [function.name for function in functions] == ["prefill_8", "prefill_2"]
    assert [[spec.name for spec in function.signature.call] for function in functions] == [[IDS, POSITIONS, SLOTS]] * 2
    assert functions[0].signature.outputs[0].shape == (1, 8, 8)


def test_what_kernels_cannot_index_is_named():
    def problems(**changes):
        shape = msgspec.structs.replace(SHAPE, **changes)
        model = model_with((8, None))
        return [problem for f in functions_of(model, shape, "float32") for problem in size_problems(model, f)]

    assert problems() == []
    (problem,) = problems(prefill_chunks=(2**28,))
    assert problem == (
        f"function prefill_{2**28} computes 16 numbers for each of {2**28} tokens at once, "
        f"expected at most {ACTIVATION_LIMIT} numbers in all"
    )
    rows = 2**22 + 2**19
    assert (
        f"function step_{rows} has logits [{rows}, 1, 500] float32, expected at most {ACTIVATION_LIMIT} elements"
        in (problems(step_rows=(1, rows)))
    )
    found = problems(slots=2**34)
    assert found[0] == (
        f"function prefill_8 has past_key_values.1.key [{2**34}, 1, 48, 4] float32, expected at most {2**40} elements"
    )
