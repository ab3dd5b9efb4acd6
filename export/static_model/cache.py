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

from export.static_model.constants import CACHE_LEVELS, DYNAMIC_LEVELS, LARGEST_FLOAT8, SMALLEST_PEAK, SMALLEST_STEP
from runtime.artifact.caches import GROUP, HALF

FLOAT8 = torch.float8_e4m3fn
Stored = tuple[torch.Tensor, ...]  # the tensors of a cache, as `runtime.artifact.caches` lists them


def append(past: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """Concatenate W past and T new slots (B, n_kv_heads, W or T, head_dim) to (B, n_kv_heads, W + T, head_dim).

    ONNX converts 8-bit floats and does nothing else with them: these are widened before.
    """
    if new.dtype == FLOAT8:
        past, new = past.float(), new.float()
    return torch.cat((past, new), dim=2)


def keep_last(columns: torch.Tensor, new_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """Drop the oldest `new_tokens` slots with one static slice; the others have the dtype of the cache."""
    return columns[:, :, new_tokens:, :].to(dtype)


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
    """New slots (B, n_kv_heads, T, head_dim) as a cache whose numbers have this dtype keeps them."""
    return _STORED.get(dtype, lambda numbers: (numbers.to(dtype),))(columns)


def shared(columns: Stored, dtype: torch.dtype) -> torch.Tensor:
    """Slots as attention computes with them: (B, n_kv_heads, 1, W + T, head_dim), shared by all heads of a group."""
    parts = [part[:, :, None].to(dtype) for part in columns]
    return _SHARED[len(parts)](*parts)


def _float8_stored(columns: torch.Tensor) -> Stored:
    """Each number as the nearest of e4m3, within its largest: beyond, torch knows only NaN."""
    low = torch.where(columns > LARGEST_FLOAT8, LARGEST_FLOAT8, columns)
    return (torch.where(low < -LARGEST_FLOAT8, -LARGEST_FLOAT8, low).to(FLOAT8),)


def _int8_stored(columns: torch.Tensor) -> Stored:
    """Each slot as whole multiples of its scale, (max |x| + smallest) / levels."""
    scale = (columns.abs().amax(-1, keepdim=True) + SMALLEST_PEAK) / DYNAMIC_LEVELS
    return (columns / scale).round().to(torch.int8), scale


def _int4_stored(columns: torch.Tensor) -> Stored:
    """Each group of neighbours as its minimum plus 0 to 15 times its scale, both in float16; two numbers in a byte.

    As llama.cpp's Q4_1 stores a group (ggml-quants.c, `quantize_row_q4_1_ref`), but numbers are rounded, half to even,
    with the scale and the minimum that are stored.
    """
    groups = columns.unflatten(-1, (-1, GROUP))  # (B, n_kv_heads, T, groups, GROUP)
    minimum = groups.amin(-1, keepdim=True).to(torch.float16)
    low = minimum.to(columns.dtype)
    step = (groups.amax(-1, keepdim=True) - low) / CACHE_LEVELS
    # limits by `where` and `relu`, since what TVM makes of ONNX's Clip has no form that a rule could match
    scale = torch.where(step > SMALLEST_STEP, step, SMALLEST_STEP).to(torch.float16)
    above = ((groups - low) / scale.to(columns.dtype)).round().relu()
    levels = torch.where(above < CACHE_LEVELS, above, CACHE_LEVELS)
    pairs = (levels[..., :HALF] + levels[..., HALF:] * 16).to(torch.uint8)
    return pairs.flatten(-2), scale.flatten(-2), minimum.flatten(-2)


def _int4_shared(pairs: torch.Tensor, scale: torch.Tensor, minimum: torch.Tensor) -> torch.Tensor:
    """Slots (..., head_dim) from pairs (..., head_dim / 2) and each group's scale and minimum (..., groups)."""
    halves = pairs.unflatten(-1, (-1, HALF))
    high = (halves / 16).floor()
    levels = torch.cat((halves - high * 16, high), dim=-1)  # (..., groups, GROUP)
    return (levels * scale[..., None] + minimum[..., None]).flatten(-2)


# by the dtype of a cache's numbers
_STORED = {FLOAT8: _float8_stored, torch.int8: _int8_stored, torch.uint8: _int4_stored}
_SHARED = {1: lambda numbers: numbers, 2: torch.mul, 3: _int4_shared}  # by the number of a cache's tensors
