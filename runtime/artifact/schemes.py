"""`quantize.scheme`: how each scheme stores matrices, and what a box must know about it. A new scheme is a row here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

# What a token's activations are rounded to before a product: whole numbers if the weights are, or bfloat16, in which
# each number has an exponent of its own. In float32 they are multiplied as they are.
Rounding = Literal["none", "bfloat16", "int8", "int16"]
COARSEST_FIRST: tuple[Rounding, ...] = ("int8", "bfloat16", "int16", "none")
# By rounding to whole numbers: an activation is a whole number, of at most this size, times its group's scale. 16 bits
# are multiplied as 256 times one number of 8 bits plus another, of which the first is at most 127: 127 * 256.
ROUNDING_LEVELS: Mapping[Rounding, float] = {"int8": 127.0, "int16": 32512.0}


class TokenRounding(NamedTuple):
    """How a token's K activations are rounded before a product."""

    together: int  # neighbours that share a scale; 1 if there are no scales
    rounding: Rounding
    order: NDArray[np.int32] | None = None  # (K,): in which they are neighbours, if that is not their own order


SchemeName = Literal[
    "source", "source_dynamic", "none", "bf16_dot", "fp8", "int8", "int8_dynamic", "int4", "int4_dynamic"
]

RoundingMethod = Literal["search", "weighted_search", "gptq"]  # `export.calibration.methods` says what each does
DEFAULT_METHOD: RoundingMethod = "weighted_search"


@dataclass(frozen=True)
class Scheme:
    """One way of storing the matrices of a model."""

    format: str | None  # a row of `export.weights.table.FORMATS`; None: as `backend.dtype` says
    grouped: bool = False  # each group of `quantize.group_size` numbers has its own scale
    rounding: Rounding = "none"  # of activations
    carries: bool = False  # a quantized matrix keeps the numbers that the checkpoint stores


SCHEMES: Mapping[SchemeName, Scheme] = {
    "source": Scheme(None, carries=True),
    "source_dynamic": Scheme(None, rounding="int8", carries=True),
    "none": Scheme(None),
    "bf16_dot": Scheme("bfloat16", rounding="bfloat16"),
    "fp8": Scheme("float8"),
    "int8": Scheme("int8"),
    "int8_dynamic": Scheme("int8", rounding="int8"),
    "int4": Scheme("int4", grouped=True),
    "int4_dynamic": Scheme("int4", grouped=True, rounding="int8"),
}
