"""The random GGUF holds what the random checkpoint holds, as llama.cpp's converter would write it."""

import ml_dtypes
import numpy as np
from gguf import GGUFReader
from safetensors.torch import load_file

from build.tools.random_checkpoint import SHAPES, write_random_checkpoint
from build.tools.random_gguf import write_random_gguf
from tests.helpers.gguf_files import gguf_name, interleave


def test_it_holds_the_random_checkpoint(tmp_path):
    write_random_checkpoint(tmp_path / "folder", "tiny", 2)
    write_random_gguf(tmp_path / "x.gguf", "tiny", 2)
    reader = GGUFReader(tmp_path / "x.gguf")
    assert reader.get_field("llama.block_count").contents() == 2
    assert reader.get_field("llama.vocab_size").contents() == SHAPES["tiny"]["vocab_size"]
    found = {tensor.name: as_float32(tensor) for tensor in reader.tensors}
    heads = {"q_proj": SHAPES["tiny"]["num_attention_heads"], "k_proj": SHAPES["tiny"]["num_key_value_heads"]}
    for file in (tmp_path / "folder").glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            expected = tensor.float().numpy()
            count = next((count for part, count in heads.items() if part in name), None)
            expected = expected if count is None else interleave(expected, count)
            np.testing.assert_array_equal(found.pop(gguf_name(name)), expected)
    assert not found


def as_float32(tensor):
    """A tensor of the GGUF; its reader gives a bfloat16 as two bytes."""
    if tensor.tensor_type.name == "F32":
        return tensor.data
    return tensor.data.view(ml_dtypes.bfloat16).astype(np.float32)
