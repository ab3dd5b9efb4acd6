"""Reads NF4 and FP4 of bitsandbytes: blocks of a flattened matrix, whose numbers index a table of 16 values.

weight        uint8, two numbers in a byte, the first one in the upper half
absmax        (blocks,)  float32 scales or, if they are quantized too, uint8 that index the table nested_quant_map
quant_map     float32 (16,)
nested_*      nested_absmax (blocks of 256 scales,), nested_quant_map (256,)
quant_state.bitsandbytes__nf4  JSON in bytes: the shape, the size of a block, the dtype of the weights, nested_offset

A weight is table[number] * scale in float32, rounded to the dtype of the weights, and a nested scale is
nested_quant_map[number] * nested_absmax + nested_offset: bitsandbytes/backends/default/ops.py and `QuantState` in
bitsandbytes/functional.py. No row has a scale of its own, so such a matrix is read as floats.
"""

import json
from dataclasses import dataclass
from typing import Annotated, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.checkpoints.json_files import convert
from export.checkpoints.quantized.matrix import Float32, Found, QuantizedMatrix
from export.checkpoints.quantized.module import Module, modules
from export.checkpoints.source import TensorSource
from runtime.artifact.tensor_file import numpy_dtype
from runtime.errors import UserError

TYPES = ("nf4", "fp4")
STATE = "weight.quant_state.bitsandbytes__"  # before the type
SCALE, TABLE = "weight.absmax", "weight.quant_map"
NESTED_SCALE, NESTED_TABLE = "weight.nested_absmax", "weight.nested_quant_map"
STATE_LIMIT = 2**16  # bytes
Size = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class _State(msgspec.Struct, frozen=True):
    blocksize: Size
    shape: tuple[Size, Size]
    dtype: Literal["float16", "bfloat16", "float32"]
    nested_blocksize: Size | None = None
    nested_offset: float = 0.0


@dataclass(frozen=True)
class FourBitMatrix:
    """Reads the tensors of one matrix."""

    module: Module
    state: _State

    def floats(self, rows: slice) -> Float32:
        """Rows (n, K) as bitsandbytes gives them."""
        n, k = self.state.shape
        start, stop, _ = rows.indices(n)
        first, last = start * k, stop * k  # of the flattened matrix
        packed = self.module.read("weight", slice(first // 2, -(-last // 2))).reshape(-1)
        numbers = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[first % 2 :][: last - first]
        size = self.state.blocksize
        scales = self._scales(slice(first // size, -(-last // size)))
        values = self.module.read(TABLE)[numbers] * scales[np.arange(first, last) // size - first // size]
        rounded: Float32 = values.astype(numpy_dtype(self.state.dtype)).astype(np.float32)
        return rounded.reshape(stop - start, k)

    def _scales(self, blocks: slice) -> Float32:
        stored = self.module.read(SCALE, blocks)
        nested = self.state.nested_blocksize
        if nested is None:
            return stored
        numbers: NDArray[np.int64] = np.arange(blocks.start, blocks.stop) // nested
        scaled = self.module.read(NESTED_TABLE)[stored] * self.module.read(NESTED_SCALE)[numbers]
        return np.asarray(scaled + np.float32(self.state.nested_offset))


def read_4bit(source: TensorSource, where: str) -> Found:
    """The matrices that a source stores in 4 bits; raises `UserError` for what does not fit together."""
    matrices = {}
    for kind in TYPES:
        for module in modules(source, where, STATE + kind):
            matrices[module.matrix] = _matrix(module, kind)
    return Found(matrices)


def _matrix(module: Module, kind: str) -> QuantizedMatrix:
    state = _state(module, STATE + kind)
    n, k = state.shape
    module.check("weight", ("uint8",), (-(-n * k // 2), 1), f"{n} x {k} numbers of 4 bits")
    blocks = -(-n * k // state.blocksize)
    nested = state.nested_blocksize is not None
    module.check(SCALE, ("uint8",) if nested else ("float32",), (blocks,), f"blocks of {state.blocksize} numbers")
    module.check(TABLE, ("float32",), (16,), "numbers of 4 bits")
    if state.nested_blocksize is not None:
        count = -(-blocks // state.nested_blocksize)
        module.check(NESTED_SCALE, ("float32",), (count,), f"{blocks} scales in blocks of {state.nested_blocksize}")
        module.check(NESTED_TABLE, ("float32",), (256,), "scales of 8 bits")
    details = f"in blocks of {state.blocksize}{', scales in 8 bits' if nested else ''}"
    stored = module.present("weight", SCALE, TABLE, NESTED_SCALE, NESTED_TABLE, STATE + kind)
    return QuantizedMatrix(state.shape, kind.upper(), details, stored, FourBitMatrix(module, state).floats)


def _state(module: Module, ending: str) -> _State:
    (size,) = module.need(ending, ("uint8",), rank=1)
    name = f"{module.where}: the tensor {module.of(ending)}"
    if size > STATE_LIMIT:
        raise UserError(f"{name} has {size} bytes, expected at most {STATE_LIMIT}; fetch the checkpoint again")
    try:
        value = json.loads(module.read(ending).tobytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name} is not valid JSON; fetch the checkpoint again") from error
    return convert(value, _State, name)
