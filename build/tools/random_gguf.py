"""The weights of `build.tools.random_checkpoint` as a GGUF, which llama.cpp reads; it has no vocabulary.

Names, and the order of the rows of wq and wk, are those of llama.cpp's converter.
"""

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from build.tools.random_checkpoint import SHAPES, random_block, random_values, shards_of
from export.console import byte_bar
from runtime.artifact.manifest import TensorSpec

Array = NDArray[Any]
STORED: Mapping[int, tuple[np.dtype[Any], GGMLQuantizationType]] = {  # by the number of dimensions
    1: (np.dtype(np.float32), GGMLQuantizationType.F32),
    2: (np.dtype(np.uint16), GGMLQuantizationType.BF16),
}


def write_random_gguf(path: Path, shape: str, layers: int) -> None:
    """Write a shape of `SHAPES` in bfloat16, its norms in float32; holds one tensor at a time."""
    writer = GGUFWriter(path, "llama")
    _write_keys(writer, SHAPES[shape], layers)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    total = 0
    for spec in _specs(shape, layers):
        known = f"{names.get_name(spec.name.removesuffix('.weight'))}.weight"
        dtype, kind = STORED[len(spec.shape)]
        nbytes = prod(spec.shape) * dtype.itemsize
        writer.add_tensor_info(known, spec.shape, dtype, nbytes, kind)
        total += nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    with byte_bar("writing random weights", total) as bar:
        for array in _tensors(shape, layers):
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


def _specs(shape: str, layers: int) -> Iterator[TensorSpec]:
    return (spec for shard in shards_of(shape, layers) for spec in shard)


def _tensors(shape: str, layers: int) -> Iterator[Array]:
    """The numbers of each tensor, in the order and the type that they have in a GGUF."""
    sizes, block = SHAPES[shape], random_block()
    heads = {"q_proj": sizes["num_attention_heads"], "k_proj": sizes["num_key_value_heads"]}
    for spec in _specs(shape, layers):
        array = random_values(spec.shape, block)
        if array.ndim == 1:
            yield array.astype(np.float32)
            continue
        count = next((count for part, count in heads.items() if part in spec.name), None)
        ordered = array if count is None else _interleaved(array, count)
        yield ordered.view(np.uint16)


def _interleaved(rows: Array, heads: int) -> Array:
    """The rows of each head, of which the converter puts those of both halves in turns."""
    halves = rows.reshape(heads, 2, -1, rows.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
