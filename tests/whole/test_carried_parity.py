"""Checkpoints whose quantized matrices are carried as they are, through torch, onnxruntime and the compiled artifact.

`transformers` gets the floats that the numbers mean, from the readers, whose exactness has tests of its own.
"""

import contextlib
import json

import gguf
import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from build.compile import compile_job
from build.parity import run_artifact_rungs
from export.job import Job
from export.parity import run_rungs
from export.pipeline import export_model
from export.proof.ladder import load_trace
from export.results import open_configured
from tests.helpers.artifacts import ONE_LEVEL
from tests.helpers.quantized_checkpoints import FORMS, write_quantized
from tests.helpers.tiny import write_tiny_mistral

# One for each way in which our formats store numbers, and for what becomes of those that cannot be carried. That the
# other forms are read exactly has tests of its own.
CHOSEN = (
    "gptq-4-act-order-asymmetric",
    "gptq-8-asymmetric",
    "awq",
    "compressed-4-rows",
    "fp8-blocks",
    "nf4",
)
WINDOW = 7
# Of each block type: where the float16 factors of its scales and minimums lie, and their size for small weights.
FACTORS = {
    "Q4_0": {0: 0.006},
    "Q4_1": {0: 0.006, 2: -0.05},
    "Q5_0": {0: 0.003},
    "Q5_1": {0: 0.003, 2: -0.05},
    "Q8_0": {0: 0.0004},
    "Q2_K": {80: 0.003, 82: 0.003},
    "Q3_K": {108: 0.001},
    "Q4_K": {0: 0.0002, 2: 0.0015},
    "Q5_K": {0: 0.0001, 2: 0.0015},
    "Q6_K": {208: 0.00003},
    "IQ4_NL": {0: 0.0004},
    "IQ4_XS": {0: 0.00003},
}
EXPONENTS = (118, 121)  # of MXFP4: a byte, for scales of 2^-10 to 2^-8
DIM, HIDDEN, HEADS, KV_HEADS, VOCABULARY = 256, 512, 4, 2, 288


def proved(folder, checkpoint, **shape):
    """The rows of the ladder, and the weights record, of a checkpoint compiled with the default scheme."""
    config = {
        "name": "carried",
        "frontend": {"checkpoint": str(checkpoint)},
        "shape": {"prefill_chunk": [4], "cache_len": 2 * WINDOW + 3, **shape},
        "backend": {"target": "llvm", "cpu": ONE_LEVEL},
    }
    with contextlib.chdir(folder):
        (folder / "model.yaml").write_text(json.dumps(config))
        job = Job.load(folder / "model.yaml")
        opened, graphs = open_configured(job.config), export_model(job)
        artifact = compile_job(job)
        rows = run_rungs(job.config, opened, graphs, folder / "trace.npz")
        rows += run_artifact_rungs(artifact, *load_trace(folder / "trace.npz"))
    assert {row.rung for row in rows} == {"1", "2", "3", "4", "5"}
    assert [row.compared for row in rows if not row.passed] == []
    return graphs.record


def matrices_of_layers(record):
    return [tensor for tensor in record.tensors if tensor.name.startswith("layers.") and len(tensor.shape) == 2]


@pytest.mark.parametrize("form", CHOSEN)
def test_quantized_folders(tmp_path, form):
    write_tiny_mistral(
        tmp_path / "plain",
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=1,
        vocab_size=300,
        sliding_window=WINDOW,
        dtype=torch.float16,
    )
    write_quantized(tmp_path / "plain", tmp_path / "quantized", FORMS[form])
    record = proved(tmp_path, tmp_path / "quantized")
    assert {tensor.carried for tensor in matrices_of_layers(record)} == {form != "nf4"}
    assert record.quantization.scheme == "source"


def test_every_block_type_of_a_gguf(tmp_path):
    """Four types in each layer; in one more, the parts of wqkv and of w13 differ in theirs."""
    layers = [dict(zip(MATRICES, in_order, strict=True)) for in_order in layers_of(list(FACTORS))]
    mixed = {
        "attn_q": "Q4_K",
        "attn_k": "Q4_K",
        "attn_v": "Q6_K",
        "ffn_gate": "Q4_0",
        "ffn_up": "Q5_1",
        "ffn_down": "MXFP4",
    }
    write_blocks(tmp_path / "model.gguf", [*layers, MATRICES_Q4 | mixed])
    record = proved(tmp_path, tmp_path / "model.gguf")
    stored = {tensor.name: tensor for tensor in record.tensors}
    assert all(tensor.carried for tensor in matrices_of_layers(record))
    joined = stored[f"layers.{len(layers)}.attention.wqkv.weight"].stored
    assert (joined.dtype, joined.group_size, joined.scales, joined.offsets) == ("int8", 16, "float32", "minimums")
    head = stored["tok_embeddings.weight"]
    assert (head.stored.dtype, head.stored.group_size, head.carried) == ("int8", None, False)


MATRICES = {  # rows and columns, in a file
    "attn_q": (DIM, DIM),
    "attn_k": (DIM // 2, DIM),
    "attn_v": (DIM // 2, DIM),
    "attn_output": (DIM, DIM),
    "ffn_gate": (HIDDEN, DIM),
    "ffn_up": (HIDDEN, DIM),
    "ffn_down": (DIM, HIDDEN),
}


def layers_of(types):
    """The types of the matrices of each layer: one for wqkv, one for wo, one for w13 and one for w2."""
    for i in range(0, len(types), 4):
        qkv, out, up, down = types[i : i + 4]
        yield qkv, qkv, qkv, out, up, up, down


MATRICES_Q4 = dict.fromkeys(MATRICES, "Q4_0")


def write_blocks(path, layers):
    """A GGUF of random blocks; `layers` gives the type of each matrix of each layer."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_vocab_size(VOCABULARY)
    writer.add_embedding_length(DIM)
    writer.add_block_count(len(layers))
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(DIM // HEADS)
    add_blocks(writer, "token_embd", "Q8_0", (VOCABULARY, DIM), rng)
    writer.add_tensor("output_norm.weight", np.ones(DIM, np.float32))
    for i, kinds in enumerate(layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(DIM, np.float32))
        for name, kind in kinds.items():
            add_blocks(writer, f"blk.{i}.{name}", kind, MATRICES[name], rng)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_blocks(writer, name, kind, shape, rng):
    packing = GGMLQuantizationType[kind]
    size, block_bytes = GGML_QUANT_SIZES[packing]
    blocks = rng.integers(0, 256, (shape[0], shape[1] // size, block_bytes), dtype=np.uint8)
    if kind not in FACTORS:
        blocks[..., 0] = rng.integers(*EXPONENTS, blocks.shape[:2])
    for at, factor in FACTORS.get(kind, {}).items():
        factors = (factor * rng.uniform(0.5, 1, blocks.shape[:2])).astype(np.float16)
        blocks[..., at : at + 2] = factors[..., None].view(np.uint8)
    writer.add_tensor(f"{name}.weight", blocks.reshape(shape[0], -1), raw_dtype=packing)
