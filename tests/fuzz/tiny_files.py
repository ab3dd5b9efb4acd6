"""The smallest valid checkpoint and tokenizer in each format, made in milliseconds and without torch."""

import importlib.resources
import json
from base64 import b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save, save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from export.weights.storing import record_of, write_tokenizer
from runtime.artifact.manifest import Quantization, TokenizerSpec
from tests.fuzz.reader import demand

MISTRAL_DATA = Path(str(importlib.resources.files("mistral_common") / "data"))
DIM, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 32, 64, 2, 1, 16, 300
CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Every tensor: its name in Hugging Face's format, in Mistral's own and in GGUF, and its shape.
ROWS: tuple[tuple[str, str, str, tuple[int, ...]], ...] = (
    ("model.embed_tokens", "tok_embeddings", "token_embd", (VOCAB, DIM)),
    ("model.layers.0.input_layernorm", "layers.0.attention_norm", "blk.0.attn_norm", (DIM,)),
    ("model.layers.0.self_attn.q_proj", "layers.0.attention.wq", "blk.0.attn_q", (HEADS * HEAD_DIM, DIM)),
    ("model.layers.0.self_attn.k_proj", "layers.0.attention.wk", "blk.0.attn_k", (KV_HEADS * HEAD_DIM, DIM)),
    ("model.layers.0.self_attn.v_proj", "layers.0.attention.wv", "blk.0.attn_v", (KV_HEADS * HEAD_DIM, DIM)),
    ("model.layers.0.self_attn.o_proj", "layers.0.attention.wo", "blk.0.attn_output", (DIM, HEADS * HEAD_DIM)),
    ("model.layers.0.post_attention_layernorm", "layers.0.ffn_norm", "blk.0.ffn_norm", (DIM,)),
    ("model.layers.0.mlp.gate_proj", "layers.0.feed_forward.w1", "blk.0.ffn_gate", (HIDDEN, DIM)),
    ("model.layers.0.mlp.down_proj", "layers.0.feed_forward.w2", "blk.0.ffn_down", (DIM, HIDDEN)),
    ("model.layers.0.mlp.up_proj", "layers.0.feed_forward.w3", "blk.0.ffn_up", (HIDDEN, DIM)),
    ("model.norm", "norm", "output_norm", (DIM,)),
    ("lm_head", "output", "output", (VOCAB, DIM)),
)
HUGGINGFACE, MISTRAL, GGUF = range(3)  # the columns of `ROWS`
CONFIG: dict[str, Any] = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "hidden_size": DIM,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCAB,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    "sliding_window": 8,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": [2],
}
PARAMS: dict[str, Any] = {
    "dim": DIM,
    "n_layers": 1,
    "head_dim": HEAD_DIM,
    "hidden_dim": HIDDEN,
    "n_heads": HEADS,
    "n_kv_heads": KV_HEADS,
    "norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "rope_theta": 1e4,
    "sliding_window": [8],
    "max_seq_len": 64,
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": {"content": "<s>", "lstrip": False},
    "eos_token": "</s>",
}


def tensors(column: int, dtype: str = "float32") -> dict[str, NDArray[Any]]:
    """Random weights under one format's names."""
    rng = np.random.default_rng(0)
    return {f"{row[column]}.weight": rng.standard_normal(row[3]).astype(dtype) for row in ROWS}


def write_huggingface(folder: Path, *, chat_template: str | None = None) -> Path:
    """A folder in Hugging Face's format. A compile may take some time to try a chat template."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors(HUGGINGFACE), folder / "model.safetensors")
    (folder / "tokenizer.json").write_text(json_tokenizer().to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG | {"chat_template": chat_template}))
    return folder


def safetensors_bytes() -> bytes:
    """The weights of `write_huggingface`."""
    return save(tensors(HUGGINGFACE))


def write_mistral(folder: Path) -> Path:
    """A folder in Mistral's own format, without its weights and its tokenizer."""
    folder.mkdir()
    (folder / "params.json").write_text(json.dumps(PARAMS))
    return folder


def json_tokenizer() -> Tokenizer:
    """A byte-level BPE with two merges, and added tokens of its own."""
    names = [*CONTROL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "abc"]
    vocab = {name: i for i, name in enumerate(names)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROL])
    return tokenizer


def sentencepiece_model(pieces: int = 400) -> Any:
    """The first pieces of Mistral's own model, which hold all bytes, with the markers of ChatML among them."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((MISTRAL_DATA / "tokenizer.model.v1").read_bytes())
    del proto.pieces[pieces:]
    control = sentencepiece_model_pb2.ModelProto.SentencePiece.CONTROL
    for name in CONTROL[3:]:
        proto.pieces.add(piece=name, score=0.0, type=control)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto


def tekken_file() -> dict[str, Any]:
    """A tekken.json of all bytes and two words, with the pattern of the published ones."""
    published = json.loads((MISTRAL_DATA / "tekken_240911.json").read_text())
    words = [*(bytes([byte]) for byte in range(256)), b"ab", b"abc"]
    special = [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(CONTROL)]
    config = {
        **published["config"],
        "default_vocab_size": len(words) + len(special),
        "default_num_special_tokens": len(special),
        "version": "v7",
    }
    vocab = [
        {"rank": i, "token_bytes": b64encode(word).decode(), "token_str": word.decode("utf-8", "replace")}
        for i, word in enumerate(words)
    ]
    return {"config": config, "vocab": vocab, "special_tokens": special}


def box_tokenizer(checkpoint: Checkpoint, folder: Path) -> TokenizerSpec | None:
    """Write a checkpoint's tokenizer as an artifact has it, and return what its manifest says of it."""
    record = record_of(checkpoint, Quantization(scheme="none"), "fp32", {})
    if record.tokenizer is not None:
        for path in folder.iterdir():
            path.unlink()
        write_tokenizer(checkpoint, record, folder)
    return record.tokenizer


def opened(path: Path, kind: str, reference: Mapping[str, NDArray[Any]] | None = None) -> Checkpoint:
    """Open a checkpoint as a compile does, and read all of it; `reference` holds its tensors, read by others."""
    checkpoint = open_checkpoint(path, kind, {})
    for name in checkpoint.names():
        shape, dtype = checkpoint.shape(name), checkpoint.dtype(name)
        array = checkpoint.tensor(name)
        demand((array.shape, str(array.dtype)) == (shape, dtype), "a tensor has another shape or type than was told")
        for part in checkpoint.weights[name].parts if reference is not None else ():
            ours = np.ascontiguousarray(checkpoint.source.read(part.source, slice(None)))
            theirs = np.ascontiguousarray(reference[part.source])
            demand(ours.tobytes() == theirs.tobytes(), "a tensor has other numbers than its file")
    return checkpoint
