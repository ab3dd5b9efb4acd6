"""The weights of `build.tools.random_checkpoint` as a GGUF, which llama.cpp reads; it has no vocabulary.

Names, and the order of the rows of wq and wk, are those of llama.cpp's converter.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from build.tools.random_checkpoint import SHAPES, random_block, random_values, shards_of
from export.console import byte_bar

Array = NDArray[Any]


def write_random_gguf(path: Path, shape: str, layers: int) -> None:
    """Write a shape of `SHAPES` in bfloat16, its norms in float32; holds one tensor at a time."""
    writer = GGUFWriter(path, "llama")
    _write_keys(writer, SHAPES[shape], layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    kinds = {"F32": GGMLQuantizationType.F32, "BF16": GGMLQuantizationType.BF16}
    nbytes = 0
    for name, array, kind in _tensors(shape, layers):
        known = f"{names.get_name(name.removesuffix('.weight'))}.weight"
        writer.add_tensor_info(known, array.shape, array.dtype, array.nbytes, kinds[kind])
        nbytes += array.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with byte_bar("writing random weights", nbytes) as bar:
        for _, array, _ in _tensors(shape, layers):
            writer.write_tensor_data(array)
            bar.advance(array.nbytes)
    writer.close()


def _write_keys(writer: GGUFWriter, sizes: Mapping[str, Any], layers: int) -> None:
    writer.add_context_length(sizes["max_position_embeddings"])
    writer.add_embedding_length(sizes["hidden_size"])
    writer.add_block_count(layers)
    writer.add_feed_forward_length(sizes["intermediate_size"])
    writer.add_head_count(sizes["num_attention_heads"])
    writer.add_head_count_kv(sizes["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(sizes["rms_norm_eps"])
    writer.add_rope_freq_base(sizes["rope_theta"])
    writer.add_rope_dimension_count(sizes["head_dim"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(sizes["vocab_size"])


def _tensors(shape: str, layers: int) -> Iterator[tuple[str, Array, str]]:
    """Hugging Face's name of each tensor, its numbers in the order of a GGUF, and its type there."""
    sizes, block = SHAPES[shape], random_block()
    heads = {"q_proj": sizes["num_attention_heads"], "k_proj": sizes["num_key_value_heads"]}
    for spec in (spec for shard in shards_of(shape, layers) for spec in shard):
        array = random_values(spec.shape, block)
        if array.ndim == 1:
            yield spec.name, array.astype(np.float32), "F32"
            continue
        count = next((count for part, count in heads.items() if part in spec.name), None)
        ordered = array if count is None else _interleaved(array, count)
        yield spec.name, ordered.view(np.uint16), "BF16"


def _interleaved(rows: Array, heads: int) -> Array:
    """The rows of each head, of which the converter puts those of both halves in turns."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
