"""Rotary position embedding without complex numbers, in the half-split form of Hugging Face checkpoints.

Head dimension d is rotated with d + head_dim / 2 (Su et al., 2021, "RoFormer", with the pairing of `transformers`),
whereas Mistral's own files rotate neighbours 2d and 2d + 1. The readers of such files permute the rows of wq and wk
once, so that only the half-split form exists here.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from export.static_model.rope_scaling import scaled_frequencies
from runtime.artifact.rotary import QueryScaling, RopeScaling


def inverse_frequencies(head_dim: int, rope_theta: float, scaling: RopeScaling | None = None) -> NDArray[np.float32]:
    """theta ** (-2 d / head_dim) for d in 0 .. head_dim / 2 - 1, then scaled, shape (head_dim / 2,).

    Rounded in the order of `transformers` at each step.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    periods = rope_theta**exponents  # over 2 pi
    frequencies: NDArray[np.float32] = scaled_frequencies(periods, rope_theta, scaling).numpy()
    return frequencies


def rotation(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, attention_factor: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position (B, T) times frequency (head_dim / 2,): (B, 1, T, head_dim / 2) each, in float32.

    Both are multiplied by `attention_factor`, which YaRN brings.
    """
    angles = position_ids.float()[:, None, :, None] * inv_freq  # (B, 1, T, head_dim / 2)
    if attention_factor == 1.0:
        return angles.cos(), angles.sin()
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def query_factors(position_ids: torch.Tensor, scaling: QueryScaling) -> torch.Tensor:
    """The factor of the queries at each position (B, T): (B, 1, T, 1), in float32; padding counts as position 0."""
    times = (position_ids.float().relu() / scaling.original_context).floor()
    return (1 + scaling.beta * (1 + times).log())[:, None, :, None]


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[d], x[d + head_dim / 2]) of (B, heads, T, head_dim) by its angle."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
