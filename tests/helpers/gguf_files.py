"""GGUF files of tiny models, written with the package `gguf` as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray
from safetensors.torch import load_file

from tests.helpers.tiny import DEFAULTS

Array = NDArray[Any]
EXPERTS = ".block_sparse_moe.experts."


def interleave(rows: Array, heads: int) -> Array:
    """Permute wq or wk as llama.cpp's converter does: row h * head_dim / 2 + d of a head goes to 2d + h."""
    head_dim = len(rows) // heads
    result = np.empty_like(rows)
    for head in range(heads):
        for d in range(head_dim // 2):
            for half in range(2):
                result[head * head_dim + 2 * d + half] = rows[head * head_dim + half * head_dim // 2 + d]
    return result


def gguf_name(name: str) -> str:
    """The name in a GGUF of a tensor of Hugging Face's Mistral or Mixtral, or of its stacked experts."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    return f"{names.get_name(name.removesuffix('.weight'))}.weight"


def open_writer(path: Path, architecture: str = "llama", **options: Any) -> GGUFWriter:
    """A writer with the keys of the tiny model of `tests.helpers.tiny`, with a hidden size of 128."""
    writer = GGUFWriter(path, architecture, **options)
    writer.add_context_length(512)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(20000.0)
    writer.add_rope_dimension_count(16)
    return writer


def finish(writer: GGUFWriter) -> None:
    """Write everything and close the file."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_gguf(
    path: Path,
    folder: Path,
    packing: GGMLQuantizationType,
    *,
    tied: bool = False,
    without: str = "",
    split: int = 0,
    architecture: str = "llama",
    for_llama_cpp: bool = False,
    **metadata: Any,
) -> dict[str, Array]:
    """Write a GGUF of the tiny model in `folder`, in parts of `split` tensors if that is not 0.

    llama.cpp loads it only if it says that it has no vocabulary, which is written `for_llama_cpp`; our reader refuses
    that. Returns the contents of its tensors, under Hugging Face names.
    """
    writer = open_writer(path, architecture, split_max_tensors=split)
    for key, value in metadata.items():
        writer.add_key_value(f"{architecture}.{key}", value, gguf.GGUFValueType.get_type(value))
    if for_llama_cpp:
        writer.add_tokenizer_model("no_vocab")
        writer.add_vocab_size(DEFAULTS["vocab_size"])
    held = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if name == without or (tied and name == "lm_head.weight"):
            continue
        used = packing if tensor.ndim == 2 else GGMLQuantizationType.F32
        held[name] = dequantize(quantize(tensor.numpy(), used), used)
        writer.add_tensor(gguf_name(name), quantize(stored_rows(name, tensor.numpy()), used), raw_dtype=used)
    finish(writer)
    return held


def stored_rows(name: str, tensor: Array) -> Array:
    """A tensor's rows in the order of a GGUF."""
    heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
    return tensor if heads is None else interleave(tensor, heads)


def write_mixture(
    path: Path, tensors: Mapping[str, Array], packing: GGMLQuantizationType, *, merged: bool, **keys: int
) -> None:
    """Write a GGUF of a tiny Mixtral, given under Hugging Face names, with one tensor for all experts or for each."""
    writer = open_writer(path)
    for key, value in keys.items():
        writer.add_uint32(f"llama.{key}", value)
    experts = {name: tensor for name, tensor in tensors.items() if EXPERTS in name}
    stored = {gguf_name(name): stored_rows(name, tensor) for name, tensor in tensors.items() if name not in experts}
    for layer in range(2):
        for theirs, part in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
            count = sum(f"layers.{layer}{EXPERTS}" in name and name.endswith(f"{theirs}.weight") for name in experts)
            each = [experts[f"model.layers.{layer}{EXPERTS}{e}.{theirs}.weight"] for e in range(count)]
            if merged:
                stored[gguf_name(f"layers.{layer}.feed_forward.experts.{theirs}.weight")] = np.stack(each)
            else:
                stored |= {f"blk.{layer}.ffn_{part}.{e}.weight": tensor for e, tensor in enumerate(each)}
    for name, tensor in stored.items():
        used = packing if tensor.ndim > 1 and "gate_inp" not in name else GGMLQuantizationType.F32
        writer.add_tensor(name, quantize(tensor, used), raw_dtype=used)
    finish(writer)
