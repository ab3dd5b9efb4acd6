import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import regex
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from mistral_common import __file__ as mistral_common_file
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AutoTokenizer, LlamaForCausalLM

from export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from export.checkpoints.gguf_checkpoint import QUANTIZED
from export.checkpoints.gguf_tokenizer import recover
from export.fetch import DOWNLOADS, fetch
from export.stage import ROOT
from runtime.errors import UserError
from tests.helpers.smollm2 import saved_by_transformers
from tests.helpers.tiny import write_tiny_mistral

SENTENCEPIECE = Path(mistral_common_file).parent / "data" / "tokenizer.model.v1"
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


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Permute wq or wk as llama.cpp's converter does: row h * head_dim / 2 + d of a head goes to 2d + h."""
    head_dim = len(rows) // heads
    result = np.empty_like(rows)
    for head in range(heads):
        for d in range(head_dim // 2):
            for half in range(2):
                result[head * head_dim + 2 * d + half] = rows[head * head_dim + half * head_dim // 2 + d]
    return result


def gguf_name(name: str) -> str:
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    return f"{names.get_name(name.removesuffix('.weight'))}.weight"


def write_gguf(
    path: Path, folder: Path, packing: GGMLQuantizationType, *, tied: bool = False, without: str = "", **metadata
) -> dict[str, np.ndarray]:
    """Write a GGUF of the tiny model as llama.cpp's converter would.

    Returns the contents of its tensors, under Hugging Face names.
    """
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(20000.0)
    writer.add_rope_dimension_count(16)
    for key, value in metadata.items():
        writer.add_key_value(f"llama.{key}", value, gguf.GGUFValueType.get_type(value))
    held = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name == without or (tied and name == "lm_head.weight"):
            continue
        used = packing if tensor.ndim == 2 else GGMLQuantizationType.F32
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        held[name] = dequantize(quantize(tensor.numpy(), used), used)
        stored = quantize(tensor.numpy() if heads is None else interleave(tensor.numpy(), heads), used)
        writer.add_tensor(gguf_name(name), stored, raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return held


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
        ({"expert_count": 8}, "has expert_count: 8"),
        ({"rope.scaling.type": "longrope"}, "has rope.scaling.type: 'longrope'"),
        (
            {"attention.key_length": 8, "rope.dimension_count": 8},
            r"blk.0.attn_q.weight has shape \(64, 64\), expected \(32, 64\)",
        ),
        ({"attention.sliding_window": -1}, "does not describe a model: Expected `int` >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(tiny, tmp_path, changes, message):
    write_gguf(tmp_path / "x.gguf", tiny, GGMLQuantizationType.F32, **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(tmp_path / "x.gguf", "auto", {})
    assert str(tmp_path / "x.gguf") in str(caught.value)


def test_packing_that_is_not_read(tiny, tmp_path):
    assert all(name in GGMLQuantizationType.__members__ for name in QUANTIZED)
    write_gguf(tmp_path / "x.gguf", tiny, GGMLQuantizationType.F32)
    data = (tmp_path / "x.gguf").read_bytes()
    name = b"blk.1.attn_v.weight"
    kind = data.index(name) + len(name) + 4 + 2 * 8  # after the number of dimensions and both of them
    assert data[kind : kind + 4] == GGMLQuantizationType.F32.to_bytes(4, "little")
    (tmp_path / "x.gguf").write_bytes(data[:kind] + GGMLQuantizationType.I32.to_bytes(4, "little") + data[kind + 4 :])
    with pytest.raises(UserError, match=r"blk.1.attn_v.weight has dtype I32, expected one of float32"):
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
    with pytest.raises(UserError, match=r"holds 2 .gguf files, expected one"):
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


def sentencepiece_metadata() -> dict[str, object]:
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(SENTENCEPIECE.read_bytes())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "T",
    }


def test_sentencepiece_model_is_rebuilt():
    ours = recover(sentencepiece_metadata(), "x")
    assert (ours.kind, ours.bos_id, ours.eos_ids, ours.add_bos, ours.chat_template) == (
        "sentencepiece",
        1,
        (2,),
        True,
        "T",
    )
    theirs, rebuilt = (
        SentencePieceProcessor(model_file=str(SENTENCEPIECE)),
        SentencePieceProcessor(model_proto=ours.data),
    )
    for text in TEXTS:
        ids = theirs.encode(text)
        assert rebuilt.encode(text) == ids
        assert rebuilt.decode(ids) == theirs.decode(ids)
    assert (rebuilt.bos_id(), rebuilt.eos_id(), rebuilt.unk_id(), rebuilt.pad_id()) == (1, 2, 0, -1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "has tokenizer.ggml.model: 'bert', which is not supported; expected one of gpt2, llama"),
        (
            {"model": "gpt2", "pre": "klingon"},
            "has tokenizer.ggml.pre: 'klingon', which is not supported; expected one of gpt-2, smollm",
        ),
        ({"model": "gpt2"}, "has tokenizer.ggml.pre: None"),
        ({"model": "gpt2", "pre": "gpt-2", "merges": ["qqq zzz"]}, "has merges that do not fit its tokens"),
        ({"tokens": [1]}, "has a malformed tokenizer: Expected `str`"),
        ({"token_type": [1]}, "has 32000 tokens, some of them duplicates or without a type"),
        ({"scores": []}, "has 32000 tokens and 0 scores"),
        ({"token_type": [1] * 32000}, "has 0 tokens of the type unknown"),
        ({"bos_token_id": 40000}, "names the special token 40000, expected an id below 32000"),
    ],
)
def test_bad_tokenizers(changes, message):
    with pytest.raises(UserError, match=message):
        recover(sentencepiece_metadata() | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}, "x")


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
    assert (ours.kind, ours.bos_id, ours.eos_ids, ours.add_bos) == ("tokenizer.json", 1, (2,), False)
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
