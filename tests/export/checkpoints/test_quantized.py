"""Every way of storing quantized matrices gives the floats of its public definition, as floats and as it is stored."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from export.checkpoints.checkpoint import open_checkpoint
from export.checkpoints.encodings.encoding import decoded
from tests.helpers.quantized_checkpoints import FORMS, write_quantized
from tests.helpers.tiny import write_tiny_mistral

ENCODINGS = {  # by the form: numbers, size of a group, dtype of scales, offsets; None if it cannot be carried
    "gptq-4": ("int4", 32, "float16", "none"),
    "gptq-4-bf16": ("int4", 32, "float32", "none"),
    "gptq-4-asymmetric": ("int4", 32, "float16", "zero_points"),
    "gptq-4-v2": ("int4", 32, "float16", "zero_points"),
    "gptq-4-rows": ("int4", None, "float16", "none"),
    "gptq-4-act-order": ("int4", 32, "float16", "none"),
    "gptq-4-act-order-asymmetric": ("int4", 32, "float16", "zero_points"),
    "gptq-8": ("int8", 32, "float16", "none"),
    "gptq-8-asymmetric": ("int8", 32, "float16", "zero_points"),
    "gptq-8-rows": ("int8", None, "float16", "none"),
    "gptq-2": ("int4", 32, "float16", "none"),
    "gptq-3": ("int4", 32, "float16", "zero_points"),
    "awq": ("int4", 32, "float16", "zero_points"),
    "awq-rows": ("int4", None, "float16", "zero_points"),
    "compressed-4": ("int4", 32, "float32", "none"),
    "compressed-4-asymmetric": ("int4", 32, "float16", "zero_points"),
    "compressed-4-rows": ("int4", None, "float32", "none"),
    "compressed-4-act-order": ("int4", 32, "float32", "none"),
    "compressed-8": ("int8", 32, "float32", "none"),
    "compressed-8-rows": ("int8", None, "float32", "none"),
    "compressed-int8": ("int8", None, "float32", "none"),
    "compressed-int8-asymmetric": ("int8", None, "float32", "zero_points"),
    "compressed-float8": ("float8", None, "float32", "none"),
    "compressed-float8-rows": ("float8", None, "float32", "none"),
    "compressed-float8-blocks": ("float8", 32, "float32", "none"),
    "nvfp4": ("int8", 16, "float32", "none"),
    "mxfp4": ("int8", 32, "float32", "none"),
    "fp8": ("float8", None, "float32", "none"),
    "fp8-rows": ("float8", None, "float32", "none"),
    "fp8-blocks": ("float8", 32, "float32", "none"),
    "fp8-cut-blocks": ("float8", 48, "float32", "none"),
    "bitsandbytes-int8": ("int8", None, "float32", "none"),
    "nf4": None,
    "nf4-nested": None,
    "fp4": None,
    "mlx-3": ("int4", 64, "float16", "minimums"),
    "mlx-4": ("int4", 64, "float16", "minimums"),
    "mlx-6": ("int8", 64, "float16", "minimums"),
    "mlx-8": None,
}
BORDERS = (0, 5, 24)  # of pieces that are read; the second lies within a packed word


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "tiny"
    write_tiny_mistral(
        folder, hidden_size=128, intermediate_size=256, num_hidden_layers=1, vocab_size=300, dtype=torch.bfloat16
    )
    return folder


def bits(array: np.ndarray) -> bytes:
    """The bits of floats, with one zero: the definitions do not tell 0 from -0."""
    return (array + np.float32(0)).astype(np.float32).tobytes()


def test_every_form_is_tested():
    assert set(ENCODINGS) == set(FORMS)


@pytest.mark.parametrize("form", FORMS)
def test_values_are_those_of_the_definition(tiny, tmp_path, form):
    exact = write_quantized(tiny, tmp_path / "x", FORMS[form])
    ours = open_checkpoint(tmp_path / "x", "auto", {})
    assert len(exact) == 7
    for name, expected in exact.items():
        assert len(np.unique(expected)) > 8  # the writer has kept something of the weights
        tensor = ours.source.tensors[name]
        assert (tensor.shape, tensor.dtype) == (expected.shape, "float32")
        assert bits(ours.source.read(name, slice(0, len(expected)))) == bits(expected)
        pieces = [slice(*ends) for ends in pairwise((*BORDERS, len(expected)))]
        assert bits(np.concatenate([ours.source.read(name, rows) for rows in pieces])) == bits(expected)
        if ENCODINGS[form] is None:
            assert tensor.encoded is None
            continue
        encoding = tensor.encoded.encoding
        assert (encoding.numbers, encoding.group_size, encoding.scales, encoding.offsets) == ENCODINGS[form]
        assert (encoding.order is not None) == ("act-order" in form)
        rows = [tensor.encoded.read(rows) for rows in pieces]
        assert all(
            part.numbers.dtype == rows[0].numbers.dtype and part.scales.dtype == encoding.scales for part in rows
        )
        assert bits(np.concatenate([decoded(part, encoding) for part in rows])) == bits(expected)


@pytest.mark.parametrize("form", [form for form in FORMS if ENCODINGS[form]])
def test_parts_of_one_tensor_are_carried_together(tiny, tmp_path, form):
    exact = write_quantized(tiny, tmp_path / "x", FORMS[form])
    ours = open_checkpoint(tmp_path / "x", "auto", {})
    parts = {
        "attention.wqkv": [f"self_attn.{x}_proj" for x in "qkv"],
        "feed_forward.w13": ["mlp.gate_proj", "mlp.up_proj"],
    }
    for name, of in parts.items():
        tensor = f"layers.0.{name}.weight"
        encoding = ours.encoding(tensor)
        found = np.concatenate([decoded(rows, encoding) for rows in ours.encoded_blocks(tensor, encoding)])
        expected = np.concatenate([exact[f"model.layers.0.{part}.weight"] for part in of])
        assert bits(found) == bits(expected) == bits(ours.tensor(tensor))


KEPT = "whose numbers and scales quantize.scheme: source keeps as they are"
SAID = {
    "gptq-4-act-order": f"GPTQ 4-bit in groups of 32, columns ordered by their activations: 7 matrices, {KEPT}",
    "awq": f"AWQ 4-bit in groups of 32: 7 matrices, {KEPT}",
    "compressed-int8": f"compressed-tensors int8 with a scale for each row: 7 matrices, {KEPT}",
    "fp8-cut-blocks": f"FP8 in blocks of 48 x 48: 7 matrices, {KEPT}",
    "nf4": "NF4 in blocks of 64: 7 matrices, whose values no format here holds; quantize.scheme: source stores them as "
    "int8 with a scale for each row, which moves a number by at most 1/254 of the largest in its row",
}


@pytest.mark.parametrize("form", SAID)
def test_one_sentence_says_what_was_found(tiny, tmp_path, form):
    write_quantized(tiny, tmp_path / "x", FORMS[form])
    assert open_checkpoint(tmp_path / "x", "auto", {}).notes == (SAID[form],)


def test_scales_of_activations_are_left_out_and_that_is_said(tiny, tmp_path):
    write_quantized(tiny, tmp_path / "x", FORMS["compressed-float8"])
    found, left_out = open_checkpoint(tmp_path / "x", "auto", {}).notes
    assert found.startswith("FP8 with a scale for each matrix: 7 matrices")
    assert left_out == "scales of activations and caches are left out (7): both stay as they are computed"
