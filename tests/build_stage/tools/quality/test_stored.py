"""What a checkpoint stores, by name, and how far stored matrices are from it."""

import contextlib
from dataclasses import replace

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType

from build.tools.quality.__main__ import compile_variants
from build.tools.quality.stored import described, is_quantized, layer_errors, packings
from build.tools.variants import VARIANTS, fitting_variants
from export.checkpoints.checkpoint import open_checkpoint
from export.job import Job
from export.weights.stored import StoredWeights
from runtime.errors import UserError
from tests.helpers.gguf_files import write_gguf
from tests.helpers.tiny import write_tiny_mistral


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    result = tmp_path_factory.mktemp("stored")
    write_tiny_mistral(result / "huggingface", dtype=torch.bfloat16)
    write_tiny_mistral(result / "float32", intermediate_size=128)
    return result


@pytest.mark.parametrize("packing", [GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_1])
def test_a_gguf_names_its_packings(folder, packing):
    """Norms are float32 in every file, and are no matrices."""
    path = folder / f"{packing.name}.gguf"
    write_gguf(path, folder / "float32", packing)
    checkpoint = open_checkpoint(path, "gguf", {})
    matrices = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors if len(tensor.shape) > 1}
    assert packing.name in matrices
    assert set(packings(checkpoint)) == matrices
    vectors = [tensor for tensor in checkpoint.source.tensors.values() if len(tensor.shape) == 1]
    assert {(tensor.packing, tensor.dtype) for tensor in vectors} == {(None, "float32")}


def test_a_plain_checkpoint_names_its_dtype(folder):
    checkpoint = open_checkpoint(folder / "huggingface", "huggingface", {})
    assert packings(checkpoint) == ["bfloat16"]
    assert described("fp32", packings(checkpoint)) == "fp32 of bfloat16"


def test_the_packing_with_the_most_bytes_comes_first(folder):
    checkpoint = open_checkpoint(folder / "huggingface", "huggingface", {})
    tensors = dict(checkpoint.source.tensors)
    largest = max((name for name in tensors if len(tensors[name].shape) > 1), key=lambda name: tensors[name].nbytes)

    class Source:
        pass

    source = Source()
    source.tensors = {
        name: replace(tensor, packing="Q8_0" if name == largest else "Q4_K") for name, tensor in tensors.items()
    }
    named = packings(replace(checkpoint, source=source))
    sizes = {name: tensor.nbytes for name, tensor in tensors.items() if len(tensor.shape) > 1}
    assert sizes[largest] < sum(sizes.values()) / 2
    assert named == ["Q4_K", "Q8_0"]


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["Q4_1", "Q8_0"], "fp32 of Q4_1, Q8_0"),
        (["bfloat16"], "fp32 of bfloat16"),
        (["float32"], "fp32"),
        (["Q4_K", "Q6_K", "Q5_0", "Q8_0"], "fp32 of Q4_K, Q6_K, Q5_0, ..."),
    ],
)
def test_the_baseline_says_what_it_was_read_from(names, label):
    assert described("fp32", names) == label


def test_layer_errors_are_those_of_the_stored_numbers(compile_case):
    """int8 rounds to within half a 127th of a row's largest number: below 2 percent of a matrix's size.

    int4 is tens of times coarser.
    """
    case = compile_case("int4")
    with contextlib.chdir(case.folder):  # the folder to which the checkpoint's path is relative
        errors = layer_errors(case.checkpoint, StoredWeights.open(case.graphs.folder))
    assert {kind: len(values) for kind, values in errors.items()} == {
        "tok_embeddings": 1,
        "wqkv": 2,
        "wo": 2,
        "w13": 2,
        "w2": 2,
    }
    assert 0 < errors["tok_embeddings"][0] < 0.02
    assert all(0.03 < value < 0.15 for kind, values in errors.items() if kind != "tok_embeddings" for value in values)


def test_only_a_quantized_checkpoint_has_numbers_to_carry(folder, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nfrontend: {checkpoint: nowhere}\nbackend: {target: llvm}\n")
    plain = open_checkpoint(folder / "huggingface", "huggingface", {})
    write_gguf(tmp_path / "x.gguf", folder / "float32", GGMLQuantizationType.Q8_0)
    packed = open_checkpoint(tmp_path / "x.gguf", "gguf", {})
    found = [fitting_variants(Job.load(path), is_quantized=is_quantized(each)) for each in (plain, packed)]
    assert set(found[1]) == set(VARIANTS)
    assert set(found[1]) - set(found[0]) == {"source", "source_dynamic"}


def test_an_unknown_variant_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.yaml"
    path.write_text("name: x\nfrontend: {checkpoint: nowhere}\nbackend: {target: llvm}\n")
    with pytest.raises(UserError, match="--variants names int3, expected some of fp32, "):
        compile_variants(Job.load(path), ["fp32", "int3"], "fp32", None)
    assert [each.name for each in tmp_path.iterdir()] == ["x.yaml"]  # nothing was begun
