import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from mistral_common import __file__ as mistral_common_file
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from export.checkpoints.checkpoint import open_checkpoint
from runtime.errors import UserError
from tests.helpers.tiny import write_tiny_mistral

SENTENCEPIECE = Path(mistral_common_file).parent / "data" / "tokenizer.model.v1"
V3 = Path(mistral_common_file).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("huggingface") / "tiny"
    write_tiny_mistral(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit_json(path: Path, *, remove: tuple[str, ...] = (), **changes) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (value | changes).items() if k not in remove}))


def fused(state: dict[str, torch.Tensor], n_layers: int, tied: bool) -> dict[str, np.ndarray]:
    """Our tensors, made from a transformers state dict."""
    result = {"tok_embeddings.weight": state["model.embed_tokens.weight"], "norm.weight": state["model.norm.weight"]}
    for i in range(n_layers):
        theirs, ours = f"model.layers.{i}", f"layers.{i}"
        result[f"{ours}.attention_norm.weight"] = state[f"{theirs}.input_layernorm.weight"]
        result[f"{ours}.attention.wqkv.weight"] = torch.cat(
            [state[f"{theirs}.self_attn.{x}_proj.weight"] for x in "qkv"]
        )
        result[f"{ours}.attention.wo.weight"] = state[f"{theirs}.self_attn.o_proj.weight"]
        result[f"{ours}.ffn_norm.weight"] = state[f"{theirs}.post_attention_layernorm.weight"]
        result[f"{ours}.feed_forward.w13.weight"] = torch.cat(
            [state[f"{theirs}.mlp.{x}_proj.weight"] for x in ("gate", "up")]
        )
        result[f"{ours}.feed_forward.w2.weight"] = state[f"{theirs}.mlp.down_proj.weight"]
    if not tied:
        result["output.weight"] = state["lm_head.weight"]
    return {name: tensor.float().numpy() for name, tensor in result.items()}


def assert_same_tensors(folder: Path, *, tied: bool = False) -> None:
    theirs = fused(MistralForCausalLM.from_pretrained(folder).state_dict(), 2, tied)
    ours = open_checkpoint(folder, "huggingface", {})
    assert ours.model.tied_embeddings is tied
    assert set(ours.names()) == set(theirs)
    for name, tensor in theirs.items():
        assert ours.shape(name) == tensor.shape
        assert np.array_equal(ours.tensor(name).astype(np.float32), tensor)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_equal_those_of_transformers(tmp_path, dtype):
    write_tiny_mistral(tmp_path / "x", dtype=getattr(torch, dtype), head_dim=24)
    assert_same_tensors(tmp_path / "x")
    ours = open_checkpoint(tmp_path / "x", "huggingface", {})
    assert (
        {str(ours.tensor(name).dtype) for name in ours.names()}
        == {dtype}
        == {ours.dtype(name) for name in ours.names()}
    )
    assert ours.source_bytes == sum(t.nbytes for t in load_file(tmp_path / "x" / "model.safetensors").values())


def test_tied_head(tmp_path):
    write_tiny_mistral(tmp_path / "x", tie_word_embeddings=True)
    assert_same_tensors(tmp_path / "x", tied=True)


def test_tied_head_is_stored_under_the_name_of_the_head_alone(tmp_path):
    write_tiny_mistral(tmp_path / "x", tie_word_embeddings=True)
    state = load_file(tmp_path / "x" / "model.safetensors")
    state["lm_head.weight"] = state.pop("model.embed_tokens.weight")
    save_file(state, tmp_path / "x" / "model.safetensors", {"format": "pt"})
    assert_same_tensors(tmp_path / "x", tied=True)


def test_advice_on_a_head_that_is_not_stored_and_on_a_resized_vocabulary(copy):
    state = load_file(copy / "model.safetensors")
    head = state.pop("lm_head.weight")
    save_file(state, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match="again, or set tie_word_embeddings to true there if the embeddings are the head"
    ):
        open_checkpoint(copy, "auto", {})
    resized = {"lm_head.weight": torch.cat([head, head[:2]])}
    save_file(state | resized, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="if tokens were added to the model, set vocab_size to 322 there"):
        open_checkpoint(copy, "auto", {})


NO_SETTINGS = "but no quantization_config says how; fetch the checkpoint with its configuration again"


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        ("qweight", f"quantized by GPTQ or AWQ, as the tensor .*qweight tells, {NO_SETTINGS}"),
        ("weight.absmax", f"quantized by bitsandbytes, as the tensor .*absmax tells, {NO_SETTINGS}"),
        ("biases", f"quantized by MLX, as the tensor .*biases tells, {NO_SETTINGS}"),
        ("q_weight", "quantized by ExLlamaV2, as the tensor .*q_weight tells, and are not read so.*to a GGUF file"),
    ],
)
def test_weights_that_other_software_quantized_are_told_by_their_names(copy, ending, message):
    """Without a quantization_config, and with one of a method that is not read."""
    state = load_file(copy / "model.safetensors")
    packed = torch.zeros(8, 96, dtype=torch.int32)
    save_file(state | {f"model.layers.0.mlp.up_proj.{ending}": packed}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        open_checkpoint(copy, "auto", {})
    edit_json(copy / "config.json", quantization_config={"quant_method": "exl2"})
    unknown = "has the quant_method 'exl2', expected one of gptq, .*, whose weights are read; .*to a GGUF file"
    with pytest.raises(UserError, match=message if ending == "q_weight" else unknown):
        open_checkpoint(copy, "auto", {})


def test_a_stored_head_wins_over_the_tie_flag(copy):
    edit_json(copy / "config.json", tie_word_embeddings=True)
    assert_same_tensors(copy)


def test_parts_of_different_dtypes_are_read_as_float32(copy):
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj.weight"
    save_file(tensors | {name: tensors[name].half()}, copy / "model.safetensors", {"format": "pt"})
    ours = open_checkpoint(copy, "huggingface", {})
    expected = torch.cat(
        [
            tensors[name.replace("k_proj", f"{x}_proj")].to(torch.float16 if x == "k" else torch.float32).float()
            for x in "qkv"
        ]
    )
    assert np.array_equal(ours.tensor("layers.0.attention.wqkv.weight"), expected.numpy())


def test_shards(tiny, tmp_path):
    MistralForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_tensors(tmp_path)


@pytest.mark.parametrize(
    "name", ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
)  # of old releases of transformers, and of other libraries
def test_stored_inverse_frequencies_are_ignored(copy, name):
    tensors = load_file(copy / "model.safetensors")
    save_file(tensors | {name: torch.ones(8)}, copy / "model.safetensors", {"format": "pt"})
    assert_same_tensors(copy)


CONFIG_EDITS = {
    "as saved": {},
    "no window": {"sliding_window": None},
    "window left out": {"remove": ("sliding_window",)},
    "head_dim left out": {"remove": ("head_dim",)},
    "head_dim null": {"head_dim": None},
    "old rope_theta": {"remove": ("rope_parameters",), "rope_theta": 5e5},
    "rope left out": {"remove": ("rope_parameters",)},
    "both thetas": {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}},
    "theta beside rope_parameters": {"rope_theta": 5e5, "rope_parameters": {"rope_type": "default"}},
    "null rope_scaling": {"remove": ("rope_parameters",), "rope_scaling": None, "rope_theta": 1e6},
    "tie flag left out": {"remove": ("tie_word_embeddings",)},
    "length left out": {"remove": ("max_position_embeddings",)},
    "eps left out": {"remove": ("rms_norm_eps",)},
}


@pytest.mark.parametrize("name", CONFIG_EDITS)
def test_configuration_is_what_transformers_makes_of_it(copy, name):
    edit_json(copy / "config.json", **CONFIG_EDITS[name])
    theirs = MistralConfig.from_pretrained(copy)
    ours = open_checkpoint(copy, "huggingface", {}).model
    assert ours.sliding_window == (theirs.sliding_window,) * 2
    assert (ours.dim, ours.hidden_dim, ours.n_layers) == (
        theirs.hidden_size,
        theirs.intermediate_size,
        theirs.num_hidden_layers,
    )
    assert (ours.n_heads, ours.n_kv_heads, ours.head_dim) == (
        theirs.num_attention_heads,
        theirs.num_key_value_heads,
        theirs.head_dim,
    )
    assert (ours.rope_theta, ours.norm_eps) == (theirs.rope_parameters["rope_theta"], theirs.rms_norm_eps)
    assert (ours.context_length, ours.tied_embeddings) == (theirs.max_position_embeddings, theirs.tie_word_embeddings)


def test_llama_is_a_mistral_without_a_window(tmp_path):
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=99,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    edit_json(tmp_path / "config.json", remove=("num_key_value_heads",))
    ours = open_checkpoint(tmp_path, "auto", {}).model
    assert (ours.family, ours.sliding_window, ours.n_kv_heads, ours.context_length) == ("mistral", (None, None), 4, 99)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "qwen2"}, "names the architecture 'qwen2', expected one of mistral, ministral, ministral3"),
        ({"remove": ("model_type",)}, "names the architecture None"),
        ({"hidden_act": "gelu"}, "has hidden_act: 'gelu', which is not supported; expected 'silu'"),
        ({"attention_bias": True}, "has attention_bias: True"),
        ({"is_causal": False}, "has is_causal: False"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "has partial_rotary_factor: 0.5"),
        ({"rope_parameters": {"rope_theta": "big"}}, "is malformed: Expected `float"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "has 'chunked_attention' among its layer_types"),
        ({"layer_types": ["full_attention"]}, "expected a list with one entry for each of its 2 layers"),
        ({"layer_types": ["full_attention", "sliding_attention"], "sliding_window": None}, "but no sliding_window"),
        (
            {"sliding_window": [32, None, 32]},
            "lists 3 windows in sliding_window, expected one for each of its 2 layers",
        ),
        ({"remove": ("hidden_size",)}, "lacks hidden_size, which gives the model's dim"),
        ({"hidden_size": "64"}, r"does not describe a model: Expected `int`, got `str` - at `\$.dim`"),
        ({"hidden_size": -1}, r"Expected `int` >= 1 - at `\$.dim`"),
        ({"num_hidden_layers": 10**9}, "expected a number of layers from 1 to 4096"),
        ({"num_attention_heads": 5}, "has 5 heads and 2 key-value heads, expected the first number to be a multiple"),
        ({"head_dim": 15}, "head_dim of 15, expected an even number"),
        ({"rms_norm_eps": 0.0}, "norm_eps of 0.0, expected a positive number"),
        ({"sliding_window": 0}, r"Expected `int` >= 1 - at `\$.sliding_window"),
        ({"eos_token_id": "two"}, "is malformed: Expected"),
    ],
)
def test_what_the_static_model_cannot_do_is_refused(copy, changes, message):
    edit_json(copy / "config.json", **changes)
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(copy, "huggingface", {})
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "is not valid JSON"), ("[]", "holds a list, expected an object"), (b"\xff\xff", "is not valid JSON")],
)
def test_bad_json(copy, text, message):
    (copy / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=message):
        open_checkpoint(copy, "huggingface", {})


@pytest.fixture
def sharded(tiny, tmp_path) -> Path:
    MistralForCausalLM.from_pretrained(tiny).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    return tmp_path / "sharded"


def point(folder: Path, tensor: str, shard: str | None) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"][tensor] = shard
    index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file is not None}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "outside", ["../other.safetensors", "/etc/other.safetensors", "a/../../b.safetensors", "pytorch_model.bin"]
)
def test_index_that_points_outside_the_folder_is_refused(sharded, outside):
    point(sharded, "lm_head.weight", outside)
    with pytest.raises(UserError, match=r"expected a .safetensors file inside the folder"):
        open_checkpoint(sharded, "huggingface", {})


def test_shard_that_is_not_there(sharded):
    point(sharded, "lm_head.weight", "model-9.safetensors")
    with pytest.raises(UserError, match=r"names the shard 'model-9.safetensors', which .* does not have"):
        open_checkpoint(sharded, "huggingface", {})


def test_index_and_shards_must_agree(sharded):
    point(sharded, "other.weight", "model-00001-of-00005.safetensors")
    with pytest.raises(UserError, match=r"lacks the tensor other.weight, which .*index.json lists there"):
        open_checkpoint(sharded, "huggingface", {})


def test_truncated_shard(sharded):
    shard = next(sharded.glob("model-00002*"))
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model-00002.* is truncated"):
        open_checkpoint(sharded, "huggingface", {})


def test_tokenizer_json(tiny):
    ours = open_checkpoint(tiny, "huggingface", {}).tokenizer
    theirs = AutoTokenizer.from_pretrained(tiny)
    assert (ours.kind, ours.data) == ("tokenizer.json", (tiny / "tokenizer.json").read_bytes())
    assert (ours.bos_id, ours.eos_ids, ours.add_bos) == (theirs.bos_token_id, (theirs.eos_token_id,), True)
    assert theirs("a").input_ids[0] == ours.bos_id
    assert ours.chat_template == theirs.chat_template


def test_bos_is_taken_from_the_tokenizer_unless_it_is_set(copy):
    edit_json(copy / "tokenizer_config.json", remove=("add_bos_token",), bos_token={"content": "<s>"})
    edit_json(copy / "config.json", bos_token_id=7)
    ours = open_checkpoint(copy, "huggingface", {}).tokenizer
    assert (ours.bos_id, ours.add_bos) == (1, True)
    edit_json(copy / "tokenizer.json", post_processor=None)
    assert open_checkpoint(copy, "huggingface", {}).tokenizer.add_bos is False
    edit_json(copy / "tokenizer_config.json", add_bos_token=True)
    assert open_checkpoint(copy, "huggingface", {}).tokenizer.add_bos is True


def test_several_ends_come_from_the_generation_config(copy):
    edit_json(copy / "generation_config.json", eos_token_id=[2, 4])
    assert open_checkpoint(copy, "huggingface", {}).tokenizer.eos_ids == (2, 4)


def test_chat_template_file_wins(copy):
    edit_json(
        copy / "tokenizer_config.json",
        chat_template=[{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}],
    )
    assert (
        open_checkpoint(copy, "huggingface", {}).tokenizer.chat_template
        == "D"
        == AutoTokenizer.from_pretrained(copy).chat_template["default"]
    )
    (copy / "chat_template.jinja").write_text("J")
    assert open_checkpoint(copy, "huggingface", {}).tokenizer.chat_template == "J"


def test_sentencepiece_model(copy):
    (copy / "tokenizer.json").unlink()
    shutil.copy(SENTENCEPIECE, copy / "tokenizer.model")
    edit_json(copy / "tokenizer_config.json", remove=("add_bos_token",))
    ours = open_checkpoint(copy, "huggingface", {}).tokenizer
    assert (ours.kind, ours.data, ours.bos_id, ours.add_bos) == ("sentencepiece", SENTENCEPIECE.read_bytes(), 1, True)


def test_mistrals_own_tokenizer_wins_where_a_chat_model_tells_its_version(copy):
    before = open_checkpoint(copy, "huggingface", {}).tokenizer
    shutil.copy(SENTENCEPIECE, copy / "tokenizer.model")  # states no version
    assert open_checkpoint(copy, "huggingface", {}).tokenizer == before
    shutil.copy(V3, copy / "tokenizer.model.v3")
    edit_json(copy / "generation_config.json", eos_token_id=[2, 4])
    ours = open_checkpoint(copy, "huggingface", {}).tokenizer
    assert (ours.kind, ours.data, ours.instruct, ours.chat_template) == (
        "sentencepiece",
        V3.read_bytes(),
        "v3",
        None,
    )
    assert (ours.bos_id, ours.add_bos, ours.eos_ids) == (1, True, (2, 4))
    edit_json(copy / "tokenizer_config.json", remove=("chat_template",))
    (copy / "chat_template.jinja").unlink(missing_ok=True)
    base = open_checkpoint(copy, "huggingface", {}).tokenizer
    assert (base.data, base.instruct, base.chat_template) == (V3.read_bytes(), None, None)


def test_no_tokenizer(copy):
    (copy / "tokenizer.json").unlink()
    assert open_checkpoint(copy, "huggingface", {}).tokenizer is None


@pytest.mark.parametrize(
    ("name", "message"), [("tokenizer.json", "is not a tokenizer"), ("tokenizer.model", "is not a SentencePiece model")]
)
def test_damaged_tokenizer(copy, name, message):
    (copy / "tokenizer.json").unlink()
    (copy / name).write_bytes(b"junk")
    with pytest.raises(UserError, match=message):
        open_checkpoint(copy, "huggingface", {})
