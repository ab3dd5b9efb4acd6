"""Packed weights: each number is where its layout says, and an artifact's weights are the exported ones."""

import numpy as np
import pytest

from build.packing.layout import PackedTensor, packed_tensors
from build.packing.pack import pack_weights
from export.weights.format import ModelTensor, Storage
from export.weights.int4 import unpacked
from export.weights.panels import int4_words, to_dot_panels, to_pair_panels, to_panels
from export.weights.table import store
from runtime.artifact.folder import Artifact
from runtime.artifact.layouts import DOT, PAIR, PANEL, WORD
from runtime.artifact.manifest import TensorSpec, WeightSpec
from runtime.artifact.tensor_file import TensorFile, TensorFileWriter
from tests.helpers.artifacts import CASES

SHAPES = [(1, 1), (31, 5), (32, 5), (33, 7), (100, 3)]


def number_at(packed, layout, row, k):
    """One number of a packed matrix, by the definition of its layout."""
    panel, lane = row // PANEL, row % PANEL
    for steps in (PAIR, DOT):
        if layout.endswith(f"k{steps}"):
            return packed[panel, k // steps, lane, k % steps]
    if layout.endswith(f"q{WORD}"):
        byte = int(packed[panel, k // WORD, lane]) >> 8 * (k % DOT) & 255
        return byte & 15 if k % WORD < DOT else byte >> 4
    return packed[panel, k, lane]


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_every_number_lies_in_its_place(n, k, dtype):
    matrix = np.random.default_rng(0).integers(-127, 128, (n, k)).astype(dtype)
    packed = to_panels(matrix)
    assert (packed.shape, packed.dtype) == ((-(-n // PANEL), k, PANEL), matrix.dtype)
    for row in range(packed.shape[0] * PANEL):
        assert np.array_equal(packed[row // PANEL, :, row % PANEL], matrix[row] if row < n else np.zeros(k, dtype))


@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize(
    ("pack", "dtype", "steps"), [(to_dot_panels, "int8", DOT), (to_pair_panels, "uint16", PAIR)], ids=["dot", "pair"]
)
def test_panels_of_steps_side_by_side(n, k, pack, dtype, steps):
    matrix = np.random.default_rng(0).integers(0, 128, (n, k)).astype(dtype)
    packed = pack(matrix, 2)
    assert (packed.shape, packed.dtype) == ((-(-n // PANEL), -(-k // steps), PANEL, steps), matrix.dtype)
    for row in range(n):
        assert [number_at(packed, f"k{steps}", row, column) for column in range(k)] == matrix[row].tolist()
    assert np.count_nonzero(packed) == np.count_nonzero(matrix)  # padding is zero


@pytest.mark.parametrize("n", [1, 32, 45])
def test_word_panels(n):
    numbers = np.random.default_rng(0).integers(0, 16, (n, 24)).astype(np.uint8)
    packed = to_panels(int4_words(numbers), 2)
    assert (packed.shape, packed.dtype) == ((-(-n // PANEL), 3, PANEL), np.int32)
    for row in range(n):
        assert [number_at(packed, "q8", row, column) for column in range(24)] == numbers[row].tolist()


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_pack_weights_writes_every_tensor(tmp_path, workers):
    arrays = {f"w{i}": np.random.default_rng(i).standard_normal((30 + i, 3)).astype("float32") for i in range(5)}
    arrays["norm"] = np.arange(6, dtype="float32")
    with TensorFileWriter(
        tmp_path / "in", [TensorSpec(name=n, shape=a.shape, dtype="float32") for n, a in arrays.items()]
    ) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    plain = Storage(dtype="float32")
    tensors = tuple(
        part
        for n, a in arrays.items()
        for part in packed_tensors(ModelTensor(name=n, shape=a.shape, stored=plain), 1, "llvm")
    )
    pack_weights(TensorFile.open(tmp_path / "in"), tensors, tmp_path / "out", workers)
    packed = TensorFile.open(tmp_path / "out")
    assert list(packed.tensors) == list(arrays)
    for name, array in arrays.items():
        assert np.array_equal(packed.read(name), to_panels(array) if array.ndim == 2 else array)


def test_stacked_matrices_are_padded_each(tmp_path):
    matrices = np.random.default_rng(0).standard_normal((3, 33, 4)).astype(np.float32)
    with TensorFileWriter(tmp_path / "in", [TensorSpec(name="w", shape=(99, 4), dtype="float32")]) as writer:
        writer.write("w", matrices.reshape(99, 4))
    spec = WeightSpec(name="w", shape=(6, 4, PANEL), dtype="float32", layout="panels_32x3")
    pack_weights(TensorFile.open(tmp_path / "in"), (PackedTensor(spec, 33, 3, to_panels),), tmp_path / "out", 2)
    found = TensorFile.open(tmp_path / "out").read("w")
    assert np.array_equal(found, np.concatenate([to_panels(matrix) for matrix in matrices]))


@pytest.mark.parametrize("name", CASES)
def test_artifact_holds_the_exported_numbers(compile_case, name):
    case = compile_case(name)
    exported, packed = case.graphs.weights(), Artifact.open(case.artifact)
    arrays, layouts = packed.weights(), {spec.name: spec.layout for spec in packed.manifest.weights}
    assert list(layouts) == list(exported.tensors)
    for tensor in case.graphs.record.tensors:
        expected = exported.read(tensor.name)
        if tensor.stored.dtype == "int4":
            expected = unpacked(tensor.stored, expected)
        if len(tensor.shape) == 1:
            assert np.array_equal(arrays[tensor.name], expected)
            continue
        expected = expected.view(np.uint16) if tensor.stored.dtype == "bfloat16" else expected
        generator = np.random.default_rng(0)
        for row, column in zip(
            generator.integers(0, tensor.shape[0], 200), generator.integers(0, tensor.shape[1], 200), strict=True
        ):
            assert number_at(arrays[tensor.name], layouts[tensor.name], row, column) == expected[row, column]


def test_a_matrix_of_every_format_has_its_packed_parts():
    """The number of stored tensors, and so of a kernel's arguments, follows from the format alone."""
    for stored, count in ((Storage(dtype="int8"), 2), (Storage(dtype="int4", group_size=32, offsets="zero_points"), 3)):
        tensor = ModelTensor(name="w", shape=(40, 64), stored=stored)
        arrays = store(tensor, np.ones((40, 64), np.float32))
        parts = packed_tensors(tensor, 1, "llvm")
        assert [part.spec.name for part in parts] == list(arrays)
        assert len(parts) == count
