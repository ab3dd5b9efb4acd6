"""Weight panels: each number lies where the layout says, and an artifact's weights are the exported ones."""

import numpy as np
import pytest

from build.pack import from_panels, pack_weights, to_panels
from runtime.artifact import Artifact
from runtime.manifest import TensorSpec, WeightSpec
from runtime.tensor_file import TensorFile, TensorFileWriter
from tests.artifacts import CASES

SHAPES = [(1, 1, 32), (3, 2, 2), (31, 5, 32), (32, 5, 32), (33, 7, 32), (100, 3, 8)]


def test_worked_example_of_the_module():
    rows = np.array([["a0", "a1"], ["b0", "b1"], ["c0", "c1"]])
    packed = to_panels(np.arange(1, 7).reshape(3, 2), 2)
    names = dict(zip(range(1, 7), rows.flatten(), strict=True)) | {0: "0"}
    assert [[[names[n] for n in step] for step in panel] for panel in packed.tolist()] == [[["a0", "b0"], ["a1", "b1"]], [["c0", "0"], ["c1", "0"]]]


@pytest.mark.parametrize(("n", "k", "panel"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_every_number_lies_in_its_place(n, k, panel, dtype):
    matrix = np.random.default_rng(0).integers(-127, 128, (n, k)).astype(dtype)
    packed = to_panels(matrix, panel)
    assert packed.shape == (-(-n // panel), k, panel)
    assert packed.dtype == matrix.dtype
    for row in range(packed.shape[0] * panel):
        expected = matrix[row] if row < n else np.zeros(k, dtype)
        assert np.array_equal(packed[row // panel, :, row % panel], expected)
    assert np.array_equal(from_panels(packed, n), matrix)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_pack_weights_writes_every_spec(tmp_path, workers):
    arrays = {f"w{i}": np.random.default_rng(i).standard_normal((10 + i, 3)).astype("float32") for i in range(5)}
    arrays["norm"] = np.arange(6, dtype="float32")
    with TensorFileWriter(tmp_path / "in", [TensorSpec(name=n, shape=a.shape, dtype="float32") for n, a in arrays.items()]) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    specs = [WeightSpec(name=n, shape=(-(-a.shape[0] // 4), 3, 4), dtype="float32", layout="panels_4") for n, a in arrays.items() if a.ndim == 2]
    specs.append(WeightSpec(name="norm", shape=(6,), dtype="float32", layout="row_major"))
    pack_weights(TensorFile.open(tmp_path / "in"), specs, tmp_path / "out", workers)
    packed = TensorFile.open(tmp_path / "out")
    assert list(packed.tensors) == list(arrays)
    for name, array in arrays.items():
        found = packed.read(name)
        assert np.array_equal(from_panels(found, len(array)) if array.ndim == 2 else found, array)


@pytest.mark.parametrize("name", CASES)
def test_artifact_holds_the_exported_numbers(compile_case, name):
    case = compile_case(name)
    exported, packed = case.graphs.weights(), Artifact.open(case.artifact).weights()
    assert set(packed) == set(exported.tensors)
    for weight, array in packed.items():
        expected = exported.read(weight)
        assert np.array_equal(from_panels(array, len(expected)) if expected.ndim == 2 else array, expected)
