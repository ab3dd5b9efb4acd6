"""Rotary frequencies for contexts longer than the first training's: one formula for each type of scaling.

Each computes in float32, in the order of `transformers` (`modeling_rope_utils.py`), so that the frequencies are the
same bits.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from runtime.artifact.rotary import DivisorScaling, LinearScaling, Llama3Scaling, RopeScaling, YarnScaling

SMALLEST_RAMP = 0.001  # dimensions; keeps a ramp that begins where it ends from a division by zero


def scaled_frequencies(periods: torch.Tensor, rope_theta: float, scaling: RopeScaling | None) -> torch.Tensor:
    """Inverse frequencies (head_dim / 2,) from the periods over 2 pi, theta ** (2 d / head_dim), of the same shape."""
    if scaling is None:
        return 1.0 / periods
    return FORMULAS[type(scaling)](periods, rope_theta, scaling)


def attention_factor(scaling: RopeScaling | None) -> float:
    """What cosines and sines are multiplied by."""
    return scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0


def _linear(periods: torch.Tensor, _theta: float, scaling: LinearScaling) -> torch.Tensor:
    """Positions divided by the factor (Chen et al., 2023, "Extending context window by positional interpolation")."""
    return 1.0 / periods / scaling.factor


def _divisors(periods: torch.Tensor, _theta: float, scaling: DivisorScaling) -> torch.Tensor:
    """As ggml's rope applies `freq_factors`."""
    return 1.0 / periods / torch.tensor(scaling.divisors, dtype=torch.float32, device="cpu")


def _llama3(periods: torch.Tensor, _theta: float, scaling: Llama3Scaling) -> torch.Tensor:
    """Source: `apply_scaling` of Meta's llama-models, release 3.1."""
    plain = 1.0 / periods
    wavelengths = 2 * math.pi / plain
    longest, shortest = (
        scaling.original_context / factor for factor in (scaling.low_freq_factor, scaling.high_freq_factor)
    )
    divided = torch.where(wavelengths > longest, plain / scaling.factor, plain)
    share = (scaling.original_context / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - share) * divided / scaling.factor + share * divided
    return torch.where((wavelengths < shortest) | (wavelengths > longest), divided, between)


def _yarn(periods: torch.Tensor, theta: float, scaling: YarnScaling) -> torch.Tensor:
    """Source: Peng et al., 2023, "YaRN", section 3.2 ("NTK-by-parts")."""
    half = len(periods)
    first, last = (_rotations(turns, 2 * half, theta, scaling) for turns in (scaling.beta_fast, scaling.beta_slow))
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * half - 1)
    ramp = (torch.arange(half, dtype=torch.float32, device="cpu") - first) / (last - first or SMALLEST_RAMP)
    kept = 1 - ramp.clamp(0, 1)  # share of the unscaled frequency
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept


def _rotations(turns: float, head_dim: int, theta: float, scaling: YarnScaling) -> float:
    """The dimension whose pair turns `turns` times within the original context."""
    return head_dim * math.log(scaling.original_context / (turns * 2 * math.pi)) / (2 * math.log(theta))


FORMULAS: Mapping[type, Callable[[torch.Tensor, float, Any], torch.Tensor]] = {
    LinearScaling: _linear,
    Llama3Scaling: _llama3,
    YarnScaling: _yarn,
    DivisorScaling: _divisors,
}
