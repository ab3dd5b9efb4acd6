"""Rounds one matrix to 4 bits by what its inputs were on the calibration text, and measures the error."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt

import numpy as np

from export.calibration.gptq import Solver
from export.calibration.methods import ROUNDED_AT_ONCE, Method
from export.calibration.moments import Moments
from export.weights.format import Array, Float32, ModelTensor
from export.weights.int4 import search_scales, stored_numbers
from export.weights.storing import check_range
from export.weights.table import load
from runtime.errors import UserError


@dataclass(frozen=True)
class Rounded:
    """A rounded matrix as it is stored, by stored name."""

    arrays: dict[str, Array]
    error: float  # |X W^T - X Q^T| / |X W^T|, in Frobenius norms, over the inputs of the first row of the text
    damping: float | None = None  # that made the second moments positive definite, if they were used


def rounded(tensor: ModelTensor, blocks: Iterable[Float32], moments: Moments, method: Method) -> Rounded:
    """A matrix, given as blocks of its rows, rounded by a method; the moments are used up.

    Raises `UserError` for a number that is too large to store, and for inputs that are not finite.
    """
    importance = moments.importance()
    if not np.isfinite(importance).all():
        raise UserError(
            f"{tensor.name}: the model computes numbers that are not finite on the calibration text; fetch the "
            "checkpoint again, or set quantize.method to search"
        )
    solver = Solver.of(moments.take_second_moment()) if method.solves else None
    parts: list[dict[str, Array]] = []
    wrong = right = 0.0
    first = 0
    for rows in (part for block in blocks for part in _cut(block)):
        scales = search_scales(tensor, rows, importance)
        check_range(scales.scale, tensor, first)
        first += len(rows)
        numbers = scales.rounded(rows) if solver is None else solver.rounded(rows, scales)
        stored = stored_numbers(tensor, numbers, scales)
        outputs = moments.outputs(rows)
        right += float(outputs.square().sum())
        wrong += float((moments.outputs(load(tensor, stored)) - outputs).square().sum())
        parts.append(stored)
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return Rounded(arrays, sqrt(wrong / right) if right else 0.0, None if solver is None else solver.damping)


def _cut(block: Float32) -> list[Float32]:
    count = max(ROUNDED_AT_ONCE // block.shape[1], 1)
    return [block[start : start + count] for start in range(0, len(block), count)]
