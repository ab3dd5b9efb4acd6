"""An artifact's weights; what is mapped must be what the package `safetensors` reads."""

import math
from functools import partial
from pathlib import Path

import numpy as np

from runtime.artifact.manifest import TensorSpec
from runtime.artifact.tensor_file import PADDING, TensorFile, TensorFileWriter, numpy_dtype
from tests.fuzz.reader import Reader, demand, place
from tests.fuzz.readers.safetensors_file import reference, spoil

SPECS = (
    TensorSpec(name="a", shape=(5, 3), dtype="float32"),
    TensorSpec(name="b", shape=(7,), dtype="bfloat16"),
    TensorSpec(name="c", shape=(64,), dtype="int8"),
)


def open_reader(folder: Path) -> Reader:
    path = folder / "weights.safetensors"
    with TensorFileWriter(path, SPECS, {"x": "y"}) as writer:
        for spec in SPECS:
            writer.write(
                spec.name, np.arange(math.prod(spec.shape)).reshape(spec.shape).astype(numpy_dtype(spec.dtype))
            )
    return Reader([path.read_bytes()], spoil, partial(check, path))


def check(path: Path, data: bytes) -> None:
    place(path, data)
    file = TensorFile.open(path)
    theirs = {name: array for name, array in reference(data).items() if not name.startswith(PADDING)}
    demand(set(file.tensors) == set(theirs), "other tensors than the package reads")
    for name in file.tensors:
        demand(np.ascontiguousarray(file.read(name)).tobytes() == theirs[name].tobytes(), "a tensor is read wrongly")
    for name, array in file.map().items():
        demand(np.ascontiguousarray(array).tobytes() == theirs[name].tobytes(), "a tensor is mapped wrongly")
