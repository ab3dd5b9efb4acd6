"""Rotary position embedding without complex numbers, in the half-split form of Hugging Face checkpoints.

Head dimension d is rotated with d + head_dim / 2 (Su et al., 2021, "RoFormer", with the pairing of `transformers`),
whereas Mistral's own files rotate neighbours 2d and 2d + 1. The readers of such files permute the rows of wq and wk
once, so that only the half-split form exists here.
"""

import numpy as np
import torch
from numpy.typing import NDArray


def inverse_frequencies(head_dim: int, rope_theta: float) -> NDArray[np.float32]:
    """theta ** (-2 d / head_dim) for d in 0 .. head_dim / 2 - 1, rounded like `transformers`, shape (head_dim / 2,)."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device="cpu").float() / head_dim
    frequencies: NDArray[np.float32] = (1.0 / (rope_theta**exponents)).numpy()
    return frequencies


def rotation(position_ids: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of position (B, T) times frequency (head_dim / 2,): (B, 1, T, head_dim / 2) each, in float32."""
    angles = position_ids.float()[:, None, :, None] * inv_freq  # (B, 1, T, head_dim / 2)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each pair (x[d], x[d + head_dim / 2]) of (B, heads, T, head_dim) by its angle."""
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
