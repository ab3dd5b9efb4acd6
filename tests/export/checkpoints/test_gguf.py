import shutil
from pathlib import Path

import numpy as np
import pytest
import regex
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from export.checkpoints.gguf import checkpoint as gguf_checkpoint
from export.checkpoints.gguf.checkpoint import PLAIN, GgufTensors
from export.fetch import DOWNLOADS, fetch
from export.stage import ROOT
from runtime.errors import UserError
from tests.helpers.gguf_files import finish, write_gguf
from tests.helpers.smollm2 import saved_by_transformers
from tests.helpers.tiny import write_tiny_mistral

TEXTS = [
    "The capital of France is Paris.",
    "In 2024, 1234567890 + 42 = 3.14e-10",
    "emoji 🙂🏳️‍🌈 and naïve café, 東京, Ελλάδα\n\n\ttabs   spaces  ",
    "I'm you're WE'VE it's don't",
    "<|im_start|>user\nhi<|im_end|>",
    "",
    " leading",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf") / "tiny"
    write_tiny_mistral(folder, intermediate_size=128)  # rows of 64 and 128: whole blocks of Q8_0 and Q4_1
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    return fetch(DOWNLOADS["demo"], ROOT / "out" / "downloads")


@pytest.mark.parametrize("packing", ["F32", "F16", "BF16", "Q8_0", "Q4_1"])
def test_tensors_are_dequantized_and_half_split(tiny, tmp_path, packing):
    held = write_gguf(tmp_path / "x.gguf", tiny, GGMLQuantizationType[packing])
    ours = open_checkpoint(tmp_path / "x.gguf", "auto", {})
    state = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in held.items()}
    for i in range(2):
        qkv = torch.cat([state[f"model.layers.{i}.self_attn.{x}_proj.weight"] for x in "qkv"]).numpy()
        assert np.array_equal(ours.tensor(f"layers.{i}.attention.wqkv.weight").astype(np.float32), qkv)
        w13 = torch.cat([state[f"model.layers.{i}.mlp.{x}_proj.weight"] for x in ("gate", "up")]).numpy()
        assert np.array_equal(ours.tensor(f"layers.{i}.feed_forward.w13.weight").astype(np.float32), w13)
    assert np.array_equal(ours.tensor("output.weight").astype(np.float32), held["lm_head.weight"])
    assert np.array_equal(ours.tensor("norm.weight"), held["model.norm.weight"])
    expected = {"F16": "float16", "BF16": "bfloat16"}.get(packing, "float32")
    assert (
        str(ours.tensor("layers.0.attention.wqkv.weight").dtype)
        == expected
        == ours.dtype("layers.0.attention.wqkv.weight")
    )


def test_metadata(tiny, tmp_path):
    write_gguf(tmp_path / "x.gguf", tiny, GGMLQuantizationType.F32)
    ours = open_checkpoint(tmp_path, "auto", {"sliding_window": 16})  # a folder with one .gguf
    m = ours.model
    assert (m.dim, m.hidden_dim, m.n_layers, m.n_heads, m.n_kv_heads, m.head_dim, m.vocab_size) == (
        64,
        128,
        2,
        4,
        2,
        16,
        320,
    )
    assert (m.norm_eps, m.rope_theta, m.context_length) == (np.float32(1e-5), 20000.0, 512)
    assert (m.sliding_window, m.tied_embeddings, ours.tokenizer) == ((16, 16), False, None)


def test_tied_head(tiny, tmp_path):
    write_gguf(tmp_path / "x.gguf", tiny, GGMLQuantizationType.F32, tied=True)
    ours = open_checkpoint(tmp_path / "x.gguf", "gguf", {})
    assert ours.model.tied_embeddings
    assert "output.weight" not in ours.names()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"without": "model.layers.1.mlp.up_proj.weight"}, "lacks the tensor blk.1.ffn_up.weight"),
        ({"expert_count": 8}, "lacks expert_used_count, which gives the model's experts_per_token"),
        ({"expert_count": 8, "expert_used_count": 2}, "lacks the tensor blk.0.ffn_gate_inp.weight"),
        ({"rope.scaling.type": "longrope"}, "has rope.scaling.type: 'longrope'"),
        ({"attention.causal": False}, "has attention.causal: False"),
        (
            {"attention.key_length": 8, "rope.dimension_count": 8},
            r"blk.0.attn_q.weight has shape \(64, 64\), expected \(32, 64\)",
        ),
        ({"attention.sliding_window": -1}, "does not describe a model: Expected `int` >= 1"),
        ({"attention.head_count_kv": [2, 4]}, r"has attention.head_count_kv: \[2, 4\], which differs by layer"),
        (
            {"attention.sliding_window": 8, "attention.sliding_window_pattern": "every"},
            "has attention.sliding_window_pattern: 'every', expected a list with true for each layer",
        ),
    ],
)
def test_what_does_not_fit_is_refused(tiny, tmp_path, changes, message):
    write_gguf(tmp_path / "x.gguf", tiny, GGMLQuantizationType.F32, **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(tmp_path / "x.gguf", "auto", {})
    assert str(tmp_path / "x.gguf") in str(caught.value)


UNREADABLE = {"Q8_1", "Q8_K", "Q1_0", "I8", "I16", "I32", "I64", "F64"}  # that the package has no way to unpack
QUANTIZED = sorted(set(GGMLQuantizationType.__members__) - set(PLAIN) - UNREADABLE)


@pytest.mark.parametrize("packing", QUANTIZED)
def test_blocks_are_unpacked_as_the_package_unpacks_them(tmp_path, monkeypatch, packing):
    """Of random bytes, so that every bit of a block counts; some of the numbers are infinite or none."""
    kind = GGMLQuantizationType[packing]
    block, nbytes = GGML_QUANT_SIZES[kind]
    data = np.random.default_rng(0).integers(0, 256, (5, 512 // block * nbytes), np.uint8)
    writer = GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_tensor("x", data, raw_dtype=kind)
    finish(writer)
    monkeypatch.setattr(gguf_checkpoint, "ROWS_AT_ONCE", 2)
    tensors = GgufTensors(gguf_checkpoint._read_header(tmp_path / "x.gguf")[1])
    with np.errstate(all="ignore"):
        expected, ours = dequantize(data, kind), tensors.read("x", slice(1, 4))
    assert tensors.tensors["x"].shape == expected.shape == (5, 512)
    assert ours.dtype == np.float32
    assert ours.tobytes() == np.ascontiguousarray(expected[1:4]).tobytes()


@pytest.mark.parametrize("packing", ["I32", "Q8_1", "I8"])
def test_packing_that_is_not_read(tiny, tmp_path, packing):
    write_gguf(tmp_path / "x.gguf", tiny, GGMLQuantizationType.F32)
    data = (tmp_path / "x.gguf").read_bytes()
    name = b"blk.1.attn_v.weight"
    kind = data.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions and both of them
    assert data[kind : kind + 4] == GGMLQuantizationType.F32.to_bytes(4, "little")
    (tmp_path / "x.gguf").write_bytes(
        data[:kind] + GGMLQuantizationType[packing].to_bytes(4, "little") + data[kind + 4 :]
    )
    said = f"blk.1.attn_v.weight has the type {packing}, which the package gguf cannot unpack; use a file of another"
    with pytest.raises(UserError, match=said):
        open_checkpoint(tmp_path / "x.gguf", "auto", {})


@pytest.mark.parametrize("size", [0, 3, 20, 300, 1500, -100])
def test_truncated_file(tiny, tmp_path, size):
    write_gguf(tmp_path / "x.gguf", tiny, GGMLQuantizationType.F32)
    data = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(data[:size])
    with pytest.raises(UserError, match=r"x.gguf is not a complete GGUF file"):
        open_checkpoint(tmp_path / "x.gguf", "auto", {})


def test_other_files_and_folders(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"something else, long enough to be looked at")
    with pytest.raises(UserError, match="is not a complete GGUF file: it does not begin with GGUF"):
        open_checkpoint(tmp_path / "a.gguf", "auto", {})
    (tmp_path / "b.gguf").touch()
    with pytest.raises(UserError, match=r"holds 2 different .gguf files, expected one"):
        open_checkpoint(tmp_path, "auto", {})
    writer = GGUFWriter(tmp_path / "b.gguf", "gemma")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(UserError, match="names the architecture 'gemma', expected one of llama"):
        open_checkpoint(tmp_path / "b.gguf", "auto", {})
    shutil.copy(tmp_path / "b.gguf", tmp_path / "c.gguf")
    with pytest.raises(UserError, match="the architecture 'gemma'"):
        open_checkpoint(tmp_path / "c.gguf", "gguf", {})


@pytest.fixture(scope="module")
def smollm2_by_transformers(shared_folder) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(saved_by_transformers(shared_folder / "smollm2"), dtype=torch.float32)


@pytest.fixture(scope="module")
def smollm2_by_us(smollm2) -> Checkpoint:
    return open_checkpoint(smollm2, "auto", {})


@pytest.mark.slow
def test_smollm2_tensors(smollm2_by_us, smollm2_by_transformers):
    theirs, ours = smollm2_by_transformers.state_dict(), smollm2_by_us
    for i in (0, 17, 29):
        qkv = torch.cat([theirs[f"model.layers.{i}.self_attn.{x}_proj.weight"] for x in "qkv"])
        assert np.array_equal(ours.tensor(f"layers.{i}.attention.wqkv.weight"), qkv.numpy())
        assert np.array_equal(
            ours.tensor(f"layers.{i}.feed_forward.w2.weight"), theirs[f"model.layers.{i}.mlp.down_proj.weight"].numpy()
        )
    assert np.array_equal(ours.tensor("tok_embeddings.weight"), theirs["model.embed_tokens.weight"].numpy())
    config = smollm2_by_transformers.config
    assert (ours.model.rope_theta, ours.model.norm_eps) == (config.rope_parameters["rope_theta"], config.rms_norm_eps)
    assert (ours.model.head_dim, ours.model.tied_embeddings) == (config.head_dim, True)


@pytest.mark.slow
def test_smollm2_tokenizer(smollm2, smollm2_by_us):
    theirs = AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = smollm2_by_us.tokenizer
    rebuilt = Tokenizer.from_buffer(ours.data)
    for text in TEXTS:
        ids = rebuilt.encode(text, add_special_tokens=False).ids
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert rebuilt.decode(ids, skip_special_tokens=False) == text
    assert (ours.kind, ours.bos_id, ours.eos_ids, ours.add_bos) == ("tokenizer.json", 1, (2, 0, 4), False)
    assert ours.chat_template == theirs.chat_template


@pytest.mark.slow
@pytest.mark.parametrize("text", [*TEXTS, "½ and x² of Ⅷ or ٣٤", "a1b22 333"])
def test_smollm2_text_is_split_as_llama_cpp_splits_it(smollm2_by_us, text):
    """llama.cpp's two patterns are the reference.

    transformers drops `tokenizer.ggml.pre`, and so joins a space with digits other than 0 to 9.
    """
    digits = r"\p{N}"
    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    expected = [word for part in regex.split(f"({digits})", text) for word in regex.findall(words, part)]
    split = Tokenizer.from_buffer(smollm2_by_us.tokenizer.data).pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in split] == expected


@pytest.mark.parametrize(
    ("keys", "windows"),
    [
        ({"attention.head_count": [4, 4], "attention.head_count_kv": [2, 2], "feed_forward_length": [128] * 2}, None),
        ({"attention.sliding_window": 0}, None),
        ({"attention.sliding_window": 8}, (8, 8)),
        ({"attention.sliding_window": 8, "attention.sliding_window_pattern": [True, False]}, (8, None)),
        ({"attention.sliding_window": 8, "attention.sliding_window_pattern": 2}, (8, None)),
        ({"attention.sliding_window": 8, "attention.sliding_window_pattern": 0}, (8, 8)),
    ],
)
def test_numbers_may_be_given_for_each_layer(tiny, tmp_path, keys, windows):
    write_gguf(tmp_path / "x.gguf", tiny, GGMLQuantizationType.F32, **keys)
    ours = open_checkpoint(tmp_path / "x.gguf", "auto", {}).model
    assert (ours.n_heads, ours.n_kv_heads, ours.hidden_dim) == (4, 2, 128)
    assert ours.sliding_window == (windows or (None, None))
