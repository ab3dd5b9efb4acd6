"""`quantize.scheme`: how each scheme stores matrices, and what a box must know about it. A new scheme is a row here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

# Whole numbers to which a token's activations are rounded before a product with weights that are whole numbers too.
Rounding = Literal["none", "int8", "int16"]
# By rounding: an activation is a whole number, of at most this size, times its group's scale. 16 bits are multiplied as
# 256 times one number of 8 bits plus another, of which the first is at most 127: 127 * 256.
ROUNDING_LEVELS: Mapping[Rounding, float] = {"int8": 127.0, "int16": 32512.0}


class TokenRounding(NamedTuple):
    """How a token's K activations are rounded before a product."""

    together: int  # neighbours that share a scale
    rounding: Rounding
    order: NDArray[np.int32] | None = None  # (K,): in which they are neighbours, if that is not their own order


SchemeName = Literal["source", "source_dynamic", "none", "int8", "int8_dynamic", "int4", "int4_dynamic"]

RoundingMethod = Literal["search", "weighted_search", "gptq"]  # `export.calibration.methods` says what each does
DEFAULT_METHOD: RoundingMethod = "weighted_search"


@dataclass(frozen=True)
class Scheme:
    """One way of storing the matrices of a model."""

    format: str | None  # a row of `export.weights.table.FORMATS`; None: as `backend.dtype` says
    grouped: bool = False  # each group of `quantize.group_size` numbers has its own scale
    dynamic: bool = False  # activations are rounded to int8
    carries: bool = False  # a quantized matrix keeps the numbers that the checkpoint stores


SCHEMES: Mapping[SchemeName, Scheme] = {
    "source": Scheme(None, carries=True),
    "source_dynamic": Scheme(None, dynamic=True, carries=True),
    "none": Scheme(None),
    "int8": Scheme("int8"),
    "int8_dynamic": Scheme("int8", dynamic=True),
    "int4": Scheme("int4", grouped=True),
    "int4_dynamic": Scheme("int4", grouped=True, dynamic=True),
}
