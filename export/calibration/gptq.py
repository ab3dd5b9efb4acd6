"""GPTQ: rounds a matrix column by column, and lets the columns that are left make up for each error.

Source: Frantar et al., 2023, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
arXiv 2210.17323, algorithm 1. Columns are solved in the descending order of diag(H), H = X^T X / n, but keep their
places and their groups, whose scales are fixed beforehand: kernels see plain groups.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from export.weights.format import Float32
from export.weights.scale_search import LARGEST, GroupScales

DAMPING = 0.01  # of the mean of diag(H), added to the diagonal
STRONGER = 10.0  # the factor by which the damping rises until H has a Cholesky factor
STRONGEST = 1e3  # with more than this nothing is left of H
COLUMNS = 128  # solved before the columns behind them are changed, as in the paper


@dataclass(frozen=True)
class Solver:
    """What rounding needs of H for any rows: the order of its columns, and the factor U with H^-1 = U^T U.

    `damping` is the share of the mean of diag(H) that made H positive definite.
    """

    order: torch.Tensor  # (K,)
    factor: torch.Tensor  # (K, K), upper triangular
    damping: float

    @classmethod
    def of(cls, second_moment: torch.Tensor) -> "Solver":
        """The solver of H (K, K); raises `ArithmeticError` if no damping makes it positive definite."""
        order = torch.argsort(second_moment.diagonal(), descending=True, stable=True)
        moment = second_moment[order][:, order]
        del second_moment  # its memory, if the caller has given it up
        diagonal = moment.diagonal()
        mean = float(diagonal.mean(dtype=torch.float64)) or 1.0
        exact, damping = diagonal.clone(), DAMPING
        while damping <= STRONGEST:
            diagonal.copy_(exact + damping * mean)
            factor = _inverse_factor(moment)
            if factor is not None:
                return cls(order, factor, damping)
            damping *= STRONGER
        raise ArithmeticError("the inputs hold numbers that are not finite")

    def rounded(self, rows: Float32, scales: GroupScales) -> NDArray[np.uint8]:
        """Rows (N, K) as numbers from 0 to 15, with the zero points added, for scales that stay as they are."""
        order = self.order.numpy()
        left = np.take(rows.T, order, axis=0)  # (K, N): what is left to round
        scale, zero = (np.ascontiguousarray(part.T, np.float32)[order // scales.size] for part in scales.parts)
        numbers = np.empty(left.shape, np.uint8)
        for start in range(0, len(left), COLUMNS):
            stop = min(start + COLUMNS, len(left))
            errors = _round_columns(
                left[start:stop],
                scale[start:stop],
                zero[start:stop],
                self.factor[start:stop, start:stop].numpy(),
                numbers[start:stop],
            )
            behind = self.factor[start:stop, stop:]
            torch.from_numpy(left[stop:]).addmm_(behind.T, torch.from_numpy(errors), alpha=-1)
        result = np.empty_like(numbers)
        result[order] = numbers
        return result.T


def _round_columns(
    left: Float32, scale: Float32, zero: Float32, factor: Float32, numbers: NDArray[np.uint8]
) -> Float32:
    """Round columns (n, N) into `numbers`, each after the ones before it; returns their errors over diag(U) (n, N).

    In numpy: single threads do these many small steps faster than torch's do, which wait for each other.
    """
    errors = np.empty_like(left)
    for i, value in enumerate(left):
        number = (np.rint(value / scale[i]) + zero[i]).clip(0, LARGEST)
        numbers[i] = number
        errors[i] = (value - (number - zero[i]) * scale[i]) / factor[i, i]
        left[i + 1 :] -= factor[i, i + 1 :, None] * errors[i]
    return errors


def _inverse_factor(moment: torch.Tensor) -> torch.Tensor | None:
    """U, upper triangular with H^-1 = U^T U; None if H is not positive definite to float32."""
    lower, failed = torch.linalg.cholesky_ex(moment)
    if int(failed):
        return None
    torch.cholesky_inverse(lower, out=lower)
    factor, failed = torch.linalg.cholesky_ex(lower, upper=True)
    return None if int(failed) else factor
