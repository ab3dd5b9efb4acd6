"""The rolling cache and its mask, against a table of which token sees which."""

import numpy as np
import pytest
import torch

from export.static_model import cache


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
    assert cache.keep_last(joined, 2).flatten().tolist() == [4, 5, 6]


@pytest.mark.parametrize(("slots", "tokens"), [(4, 1), (4, 4), (4, 9), (1, 3)])
def test_kept_columns_are_the_last_ones(slots, tokens):
    generator = np.random.default_rng(0)
    past, new = (torch.from_numpy(generator.standard_normal((2, 3, n, 2))) for n in (slots, tokens))
    kept = cache.keep_last(cache.append(past, new), tokens)
    assert torch.equal(kept, torch.cat([past, new], 2)[:, :, -slots:])
