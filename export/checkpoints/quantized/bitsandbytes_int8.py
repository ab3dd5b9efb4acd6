"""Reads LLM.int8 of bitsandbytes: int8 (N, K) with the largest magnitude of each row, which 127 stands for.

A weight is number * SCB / 127: `int8_vectorwise_dequant` in bitsandbytes/functional.py, which multiplies by 1 / 127.
"""

from dataclasses import dataclass

import numpy as np

from export.checkpoints.encodings.encoding import EncodedRows, Encoding, check_finite
from export.checkpoints.quantized.matrix import Found, QuantizedMatrix, floats_of
from export.checkpoints.quantized.module import FLOATS, Module, modules
from export.checkpoints.source import TensorSource
from runtime.errors import UserError

LARGEST = np.float32(127)
LAYOUT = "weight_format"
PLAIN_ROWS = 0  # the layout that transformers writes; others are of older releases, for one GPU each


@dataclass(frozen=True)
class Int8Matrix:
    """A matrix of int8, to be carried as it is."""

    module: Module
    encoding = Encoding("int8", None, "float32")

    def read(self, rows: slice) -> EncodedRows:
        """Some rows; raises `UserError` for a scale that is NaN or infinite."""
        scales = self.module.read("SCB", rows).astype(np.float32)[:, None] / LARGEST
        found = EncodedRows(self.module.read("weight", rows), scales)
        check_finite(found, self.module.of("SCB"), rows.start or 0)
        return found


def read_int8(source: TensorSource, where: str) -> Found:
    """The matrices that a source stores as int8; raises `UserError` for what does not fit together."""
    found = list(modules(source, where, "SCB"))
    layouts = {name for module in found for name in module.present(LAYOUT)}
    return Found({module.matrix: _matrix(module) for module in found}, frozenset(layouts))


def _matrix(module: Module) -> QuantizedMatrix:
    shape = module.need("weight", ("int8",))
    module.check("SCB", FLOATS, (shape[0],), f"{shape[0]} rows")
    if module.has(LAYOUT):
        _check_layout(module)
    matrix = Int8Matrix(module)
    details = "with a scale for each row"
    return QuantizedMatrix(
        shape, "bitsandbytes int8", details, module.present("weight", "SCB"), floats_of(matrix), matrix
    )


def _check_layout(module: Module) -> None:
    module.check(LAYOUT, ("uint8",), (), "one number")
    layout = int(module.read(LAYOUT))
    if layout != PLAIN_ROWS:
        raise UserError(
            f"{module.where}: the tensor {module.of(LAYOUT)} names the layout {layout}, expected rows ({PLAIN_ROWS}); "
            "save the checkpoint again with a later release of bitsandbytes"
        )
