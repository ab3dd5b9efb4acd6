"""The rolling KV cache as a static graph: append, attend under a banded mask, keep the last W slots.

Slots are in order of position, newest last. Worked example: window W = 3, chunk T = 2, and the cache holds positions
2 3 4.

    all       = Concat(past, new)      positions  2 3 4 | 5 6
    query 5 sees 3 4 5, query 6 sees 4 5 6           (a query sees itself and the W - 1 positions before it)
    present   = Slice(all, T:)         positions  4 5 6

Attention reads `all`, not `present`: query 5 needs position 3, which the slice has already dropped. Slots that were
never written and the padding on the left of a first chunk both have negative positions, so one comparison hides both.
"""

import torch

from export.static_model.constants import DYNAMIC_LEVELS, SMALLEST_PEAK

Stored = tuple[torch.Tensor, ...]  # one tensor, or int8 numbers and a float32 scale for each head of each token


def append(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Concatenate W past and T new slots (B, n_kv_heads, W or T, head_dim) to (B, n_kv_heads, W + T, head_dim)."""
    return torch.cat((past, new), dim=2)


def keep_last(columns: torch.Tensor, new_tokens: int) -> torch.Tensor:
    """Drop the oldest `new_tokens` slots with one static slice."""
    return columns[:, :, new_tokens:, :]


def visible(position_ids: torch.Tensor, slot_ages: torch.Tensor) -> torch.Tensor:
    """Mask of the W + T slots that each query may see: bool (B, T, W + T).

    `position_ids` is (B, T), consecutive in each row. `slot_ages` is (W,), W .. 1: how far each past slot lies before
    the chunk's first position.
    """
    window = slot_ages.shape[0]
    past = position_ids[:, :1] - slot_ages  # (B, W)
    key = torch.cat((past, position_ids), dim=1)[:, None, :]  # (B, 1, W + T)
    query = position_ids[:, :, None]  # (B, T, 1)
    return (key >= 0) & (key <= query) & (key > query - window)


def stored(columns: torch.Tensor, dtype: torch.dtype) -> Stored:
    """New slots (B, n_kv_heads, T, head_dim) as the cache keeps them.

    int8 stores each slot as whole multiples of its scale, (max |x| + smallest) / levels.
    """
    if dtype != torch.int8:
        return (columns.to(dtype),)
    scale = (columns.abs().amax(-1, keepdim=True) + SMALLEST_PEAK) / DYNAMIC_LEVELS
    return (columns / scale).round().to(dtype), scale


def shared(columns: Stored, dtype: torch.dtype) -> torch.Tensor:
    """Slots as attention computes with them: (B, n_kv_heads, 1, W + T, head_dim), shared by all heads of a group."""
    numbers, *scale = (part[:, :, None].to(dtype) for part in columns)
    return numbers * scale[0] if scale else numbers
