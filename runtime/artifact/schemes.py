"""`quantize.scheme`: how each scheme stores matrices, and what a box must know about it. A new scheme is a row here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

SchemeName = Literal["source", "source_dynamic", "none", "int8", "int8_dynamic", "int4", "int4_dynamic"]


@dataclass(frozen=True)
class Scheme:
    """One way of storing the matrices of a model."""

    format: str | None  # a row of `export.weights.table.FORMATS`; None: as `backend.dtype` says
    grouped: bool = False  # each group of `quantize.group_size` numbers has its own scale
    dynamic: bool = False  # activations are rounded to int8 before a product
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
