"""The rolling cache and its mask, against a table of which token sees which."""

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from export.onnx_graphs.to_onnx import OPSET
from export.static_model import cache
from tests.helpers.float8_numbers import hard_numbers, rounded


@pytest.mark.parametrize("window", [1, 2, 3, 5, 8])
def test_who_sees_whom(window):
    """Every combination of small windows, chunks and first positions, including padding (negative positions)."""
    ages = torch.arange(window, 0, -1)
    for tokens in (1, 2, 3, 7, 11):  # including a chunk longer than the window
        for first in range(-4, 2 * window + 3):
            found = cache.visible(torch.arange(first, first + tokens)[None], ages)[0].tolist()
            held = range(first - window, first + tokens)  # position in each column: W past ones, then the chunk
            expected = [
                [p >= 0 and p in range(query - window + 1, query + 1) for p in held]
                for query in range(first, first + tokens)
            ]
            assert found == expected, (window, tokens, first)


def test_rows_have_their_own_positions():
    positions = torch.tensor([[-1, 0, 1], [4, 5, 6]])
    ages = torch.arange(4, 0, -1)
    both = cache.visible(positions, ages)
    for row in range(2):
        assert torch.equal(both[row], cache.visible(positions[row : row + 1], ages)[0])


def test_worked_example_of_the_module():
    """W = 3, T = 2, and the cache holds positions 2, 3 and 4."""
    past, new = (torch.tensor(columns).view(1, 1, -1, 1) for columns in ([2, 3, 4], [5, 6]))
    joined = cache.append(past, new)
    assert joined.flatten().tolist() == [2, 3, 4, 5, 6]
    mask = cache.visible(torch.tensor([[5, 6]]), torch.tensor([3, 2, 1]))[0]
    assert [joined.flatten()[row].tolist() for row in mask] == [[3, 4, 5], [4, 5, 6]]
    assert cache.keep_last(joined, 2, past.dtype).flatten().tolist() == [4, 5, 6]


def columns_of(kind):
    """Columns (1, 2, 3, 64): random ones, zeros, equal numbers, and numbers far from zero but close together."""
    noise = np.random.default_rng(0).standard_normal((1, 2, 3, 64))
    columns = {"random": noise, "zero": 0 * noise, "equal": 0 * noise + 0.3, "far": 1000.3 + noise}[kind]
    return torch.from_numpy(columns).float()


@pytest.mark.parametrize("kind", ["random", "zero", "equal", "far"])
def test_int4_groups_are_blocks_of_gguf(kind):
    """A group's scale, minimum and bytes are a block of Q4_1, which gguf widens to the same numbers."""
    columns = columns_of(kind)
    pairs, scale, minimum = stored = cache.stored(columns, torch.uint8)
    parts = [scale[..., None].view(torch.uint8), minimum[..., None].view(torch.uint8), pairs.unflatten(-1, (-1, 16))]
    blocks = torch.cat(parts, dim=-1).numpy()
    theirs = gguf.dequantize(blocks.reshape(-1, blocks.shape[-1]), gguf.GGMLQuantizationType.Q4_1)
    ours = cache.shared(stored, torch.float32)[:, :, 0]
    assert np.array_equal(ours.numpy().ravel(), theirs.ravel())
    # Half a level; besides, the minimum and fifteen scales are rounded to float16, and the widened number to float32.
    step = torch.repeat_interleave(scale.float(), 32, dim=-1)
    rounding = 2.0**-11 * torch.repeat_interleave(minimum.float().abs(), 32, dim=-1) + 2.0**-11 * 15 * step
    assert bool(((ours - columns).abs() <= step / 2 + rounding + 2.0**-23 * columns.abs()).all())


def test_fp8_numbers_are_those_of_torch_in_onnxruntime_too():
    """The model, with its limits, and the Cast that its graphs have, against torch's own limits and cast."""
    x = hard_numbers()
    (found,) = cache.stored(torch.from_numpy(x), torch.float8_e4m3fn)
    assert np.array_equal(found.view(torch.uint8).numpy(), rounded(x))
    graph = onnx.parser.parse_graph("g (float[N] x) => (float8e4m3fn[N] y) { y = Cast<to = 17>(x) }")
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    within = x[np.abs(x) <= 448]
    assert np.array_equal(session.run(None, {"x": within})[0], rounded(within))


@pytest.mark.parametrize(("slots", "tokens"), [(4, 1), (4, 4), (4, 9), (1, 3)])
def test_kept_columns_are_the_last_ones(slots, tokens):
    generator = np.random.default_rng(0)
    past, new = (torch.from_numpy(generator.standard_normal((2, 3, n, 2))) for n in (slots, tokens))
    kept = cache.keep_last(cache.append(past, new), tokens, past.dtype)
    assert torch.equal(kept, torch.cat([past, new], 2)[:, :, -slots:])
