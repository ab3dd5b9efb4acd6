"""How a model's rotary embedding reaches beyond the context that it was first trained for: part of its configuration.

The formulas are in `rope_scaling.py` and `rope.py` of `export/static_model/`. An artifact needs none of them, since
frequencies are constants in its library.
"""

from typing import Annotated

import msgspec

Positions = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Factor = Annotated[float, msgspec.Meta(gt=0, lt=1e9)]


class LinearScaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="linear"):
    """Every frequency divided by `factor`."""

    factor: Factor


class Llama3Scaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="llama3"):
    """Llama 3.1's: long wavelengths divided by `factor`, short ones unchanged, those between in between."""

    factor: Factor
    low_freq_factor: Factor
    high_freq_factor: Factor
    original_context: Positions


class YarnScaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="yarn"):
    """YaRN (Peng et al., 2023): frequencies divided by `factor` along a ramp over the dimensions of a head.

    `attention_factor` multiplies cosines and sines.
    """

    factor: Factor
    original_context: Positions
    beta_fast: Factor
    beta_slow: Factor
    attention_factor: Factor
    truncate: bool = True  # whether the ramp begins and ends at whole dimensions


class DivisorScaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag="divisors"):
    """Each frequency divided by a number of its own, as in the tensor `rope_freqs.weight` of a GGUF file."""

    divisors: tuple[Factor, ...]  # head_dim / 2


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | DivisorScaling


class QueryScaling(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A factor of the queries at a position p, as in Llama 4: 1 + beta log(1 + floor(p / original_context))."""

    beta: Annotated[float, msgspec.Meta(ge=0, lt=1e3)]
    original_context: Positions
