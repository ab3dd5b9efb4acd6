"""The table of `quantize.method`: how numbers are rounded to 4 bits. A new method is a row here."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from export.weights.format import ModelTensor
from export.weights.stored import WeightsRecord
from runtime.artifact.schemes import RoundingMethod
from runtime.errors import UserError

LENGTH = 512  # tokens of a row, if the model was trained for as many
ROUNDED_AT_ONCE = 2**24  # numbers that are rounded together: 64 MB as float32


@dataclass(frozen=True)
class Method:
    """What a method needs of the calibration text."""

    rows: int = 0  # of the text that pass through the model; none if only the weights count
    solves: bool = False  # columns make up for each other's errors, by the second moments of the inputs


# Measured on SmolLM2-135M: for means of squares 2, 4 and 16 rows of 512 tokens give the same divergence to 1 %. Second
# moments have as many unknowns as there are pairs of columns, and need more.
METHODS: Mapping[RoundingMethod, Method] = {
    "search": Method(),
    "weighted_search": Method(rows=4),
    "gptq": Method(rows=16, solves=True),
}
WITHOUT_TEXT: RoundingMethod = "search"


def readable(record: WeightsRecord) -> WeightsRecord:
    """The record by a method that its checkpoint allows: without a tokenizer, the weights alone count.

    Raises `UserError` for a method that solves, which nobody gets without asking for it.
    """
    method, quantization = calibration(record), record.quantization
    if method is None or record.tokenizer is not None:
        return record
    if method.solves:
        raise UserError(
            f"quantize.method is {quantization.method}, which reads a calibration text, but the checkpoint has no "
            f"tokenizer; add its tokenizer's files, or set quantize.method to {WITHOUT_TEXT}"
        )
    return msgspec.structs.replace(record, quantization=msgspec.structs.replace(quantization, method=WITHOUT_TEXT))


def searched(record: WeightsRecord) -> list[ModelTensor]:
    """The tensors of a record whose numbers are rounded to 4 bits."""
    return [tensor for tensor in record.tensors if tensor.stored.grouped and not tensor.carried]


def calibration(record: WeightsRecord) -> Method | None:
    """The method by which a record's tensors are rounded, if it reads a calibration text for any of them."""
    if record.quantization.method is None or not searched(record):
        return None
    method = METHODS[record.quantization.method]
    return method if method.rows else None
