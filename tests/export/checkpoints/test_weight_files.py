"""Every form in which a folder's weights come opens as the same tensors, and what is incomplete is named."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MistralForCausalLM, MixtralConfig, MixtralForCausalLM

from export.checkpoints.checkpoint import open_checkpoint
from runtime.errors import UserError
from tests.helpers.raw_mistral import MOE, PARAMS, raw_of_transformers, raw_tensors, write_raw
from tests.helpers.tiny import write_tiny_mistral

O_PROJ = "model.layers.0.self_attn.o_proj.weight"
HEAD = "lm_head.weight"
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("forms") / "tiny"
    write_tiny_mistral(folder)
    return folder


@pytest.fixture(scope="module")
def state(tiny) -> dict[str, torch.Tensor]:
    return load_file(tiny / "model.safetensors")


@pytest.fixture
def bare(tiny, tmp_path) -> Path:
    """The folder without its weights."""
    folder = Path(shutil.copytree(tiny, tmp_path / "bare"))
    (folder / "model.safetensors").unlink()
    return folder


def split(state: dict[str, torch.Tensor], count: int) -> list[dict[str, torch.Tensor]]:
    return [{name: state[name] for name in list(state)[i::count]} for i in range(count)]


def save_shards(folder: Path, state: dict[str, torch.Tensor], count: int, suffix: str = ".safetensors") -> list[str]:
    """Write the numbered shards that transformers writes; returns their names."""
    stem, save = ("model", save_file) if suffix == ".safetensors" else ("pytorch_model", torch.save)
    names = [f"{stem}-{i:05d}-of-{count:05d}{suffix}" for i in range(1, count + 1)]
    for name, held in zip(names, split(state, count), strict=True):
        save(held, folder / name)
    return names


def write_index(folder: Path, weight_map: dict[str, str], name: str = INDEX) -> None:
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def assert_same(folder: Path, tiny: Path) -> tuple[str, ...]:
    """Check that both hold the same tensors; returns the notes."""
    found, expected = open_checkpoint(folder, "auto", {}), open_checkpoint(tiny, "auto", {})
    assert found.names() == expected.names()
    for name in expected.names():
        assert np.array_equal(found.tensor(name), expected.tensor(name)), name
    return found.notes


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder, "auto", {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "shard", ["x" * 300 + ".safetensors", "\u00e9" * 200 + ".safetensors", "x/" * 400 + "x.safetensors"]
)
def test_a_shard_with_a_name_that_no_file_can_have(bare, shard):
    write_index(bare, {HEAD: shard})
    assert f"which {bare} does not have" in refused(bare)


@pytest.mark.parametrize("count", [1, 3])
def test_bin_files_of_transformers_4(bare, tiny, state, count):
    if count == 1:
        torch.save(state, bare / "pytorch_model.bin")
    else:
        names = save_shards(bare, state, count, ".bin")
        write_index(
            bare, {key: name for name, held in zip(names, split(state, 3), strict=True) for key in held}, BIN_INDEX
        )
    assert assert_same(bare, tiny) == ()
    theirs = MistralForCausalLM.from_pretrained(bare).state_dict()
    assert np.array_equal(open_checkpoint(bare, "auto", {}).tensor("output.weight"), theirs[HEAD].numpy())


def test_tensors_of_a_bin_file_may_share_a_storage(bare, tiny, state):
    whole = torch.cat([state["model.layers.0.mlp.gate_proj.weight"], state["model.layers.0.mlp.up_proj.weight"]])
    views = dict(
        zip(("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"), whole.chunk(2), strict=True)
    )
    torch.save(state | views, bare / "pytorch_model.bin")
    assert assert_same(bare, tiny) == ()
    tied = state | {HEAD: state["model.embed_tokens.weight"]}
    torch.save(tied, bare / "pytorch_model.bin")
    checkpoint = open_checkpoint(bare, "auto", {})
    assert np.array_equal(checkpoint.tensor("output.weight"), checkpoint.tensor("tok_embeddings.weight"))


def test_safetensors_win_over_bin(bare, tiny, state):
    torch.save({name: tensor + 1 for name, tensor in state.items()}, bare / "pytorch_model.bin")
    save_file(state, bare / "model.safetensors")
    assert_same(bare, tiny)


def test_bin_file_that_would_run_code(bare, state):
    torch.save(state | {"x": Path("x")}, bare / "pytorch_model.bin")
    assert "pytorch_model.bin would run pathlib" in refused(bare)


def test_the_index_decides_between_shards(bare, tiny, state):
    """Older copies of a tensor stay in the shards that an overlay corrects."""
    stale = state | {O_PROJ: state[O_PROJ] * 0.5}
    names = save_shards(bare, stale, 2)
    weight_map = {key: name for name, held in zip(names, split(state, 2), strict=True) for key in held}
    save_file({O_PROJ: state[O_PROJ]}, bare / "an-overlay.safetensors")  # sorts before the shard with the older copy
    write_index(bare, weight_map | {O_PROJ: "an-overlay.safetensors"})
    (note,) = assert_same(bare, tiny)
    assert f"1 tensor lies in more than one shard of {bare}, {O_PROJ} in an-overlay.safetensors and model-0000" in note
    assert f"for {O_PROJ} an-overlay.safetensors" in note


def test_a_tensor_that_the_index_leaves_out_is_read_as_transformers_reads_it(bare, tiny, state):
    names = save_shards(bare, state, 2)
    weight_map = {key: name for name, held in zip(names, split(state, 2), strict=True) for key in held if key != HEAD}
    write_index(bare, weight_map)
    (note,) = assert_same(bare, tiny)
    assert f"does not list {HEAD}, which model-0000" in note
    theirs = MistralForCausalLM.from_pretrained(bare).state_dict()
    assert torch.equal(theirs[HEAD], state[HEAD])
    save_file({HEAD: state[HEAD]} | load_file(bare / names[0]), bare / names[0])
    save_file({HEAD: state[HEAD]} | load_file(bare / names[1]), bare / names[1])
    assert f"holds the tensor {HEAD}, which {names[0]} holds too" in refused(bare)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_shards_without_an_index(bare, tiny, state, suffix):
    names = save_shards(bare, state, 3, suffix)
    (note,) = assert_same(bare, tiny)
    assert note == f"{bare} has no index; its numbered shards are all read, 3 of them"
    (bare / names[1]).unlink()
    assert f"holds 2 shards of 3, but not {names[1]}; fetch the checkpoint again" in refused(bare)


def test_leftover_shards_of_another_set(bare, tiny, state):
    names = save_shards(bare, state, 3)
    save_shards(bare, state, 2)
    assert "each of a complete set of shards" in refused(bare)
    (bare / names[0]).unlink()
    assert_same(bare, tiny)


def test_a_tensor_in_two_shards_without_an_index(bare, state):
    names = save_shards(bare, state, 2)
    save_file(load_file(bare / names[1]) | {HEAD: state[HEAD]}, bare / names[1])
    save_file(load_file(bare / names[0]) | {HEAD: state[HEAD]}, bare / names[0])
    assert f"{names[1]} holds the tensor {HEAD}, which {names[0]} holds too" in refused(bare)


def test_one_file_with_another_name(bare, tiny, state):
    save_file(state, bare / "merged.fp32.safetensors")
    (note,) = assert_same(bare, tiny)
    assert note == f"{bare / 'merged.fp32.safetensors'} is read as the model, since {bare} has no model.safetensors"
    save_file(state, bare / "other.safetensors")
    assert "but 2 other files such as merged.fp32.safetensors and other.safetensors" in refused(bare)


WRAPPED = {
    "module.{}": "'module.' of torch's DataParallel",
    "_orig_mod.{}": "'_orig_mod.' of torch.compile",
    "module._orig_mod.{}": "'_orig_mod.' of torch.compile and 'module.' of torch's DataParallel",
    "base_model.model.{}": "'base_model.model.' of peft",
}


@pytest.mark.parametrize("pattern", WRAPPED)
def test_names_that_a_wrapper_changed(bare, tiny, state, pattern):
    save_file({pattern.format(name): tensor for name, tensor in state.items()}, bare / "model.safetensors")
    (note,) = assert_same(bare, tiny)
    assert WRAPPED[pattern] in note


def test_two_names_that_a_wrapper_made_of_one(bare, state):
    save_file(state | {f"_orig_mod.{HEAD}": state[HEAD].clone()}, bare / "model.safetensors")
    assert "are one name without '_orig_mod.'" in refused(bare)


@pytest.mark.parametrize(
    "name", [f"{O_PROJ.removesuffix('.weight')}.base_layer.weight", O_PROJ.replace("weight", "lora_A.default.weight")]
)
def test_an_adapter_that_is_not_merged(bare, state, name):
    save_file(state | {name: torch.zeros(4, 64)}, bare / "model.safetensors")
    assert f"holds the tensor {name}, part of an adapter that is not merged" in refused(bare)


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_leftover_quantization_config(bare, tiny, state, method):
    save_file(state, bare / "model.safetensors")
    edit_config(bare, quantization_config={"quant_method": method, "bits": 4})
    (note,) = assert_same(bare, tiny)
    assert f"has a quantization_config of {method}, but every tensor is stored as plain numbers" in note
    save_file(state | {O_PROJ.replace("weight", "scales"): torch.zeros(64)}, bare / "model.safetensors")
    assert f"has quantization_config: {{'bits': 4, 'quant_method': '{method}'}}, which is not" in refused(bare)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_experts_are_those_of_transformers(tmp_path, dtype):
    config = MixtralConfig(
        vocab_size=50, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    model = MixtralForCausalLM(config).to(dtype)
    model.save_pretrained(tmp_path / "single")
    model.save_pretrained(tmp_path / "fused", save_original_format=False)
    stored = load_file(tmp_path / "fused" / "model.safetensors")
    assert stored["model.layers.0.mlp.experts.gate_up_proj"].shape == (4, 80, 24)
    assert_same(tmp_path / "fused", tmp_path / "single")
    model.model.save_pretrained(tmp_path / "bare", save_original_format=False)  # without the prefix `model.`
    found = open_checkpoint(tmp_path / "bare", "auto", {}).tensor("layers.1.feed_forward.experts.w2.weight")
    assert np.array_equal(
        found, open_checkpoint(tmp_path / "single", "auto", {}).tensor("layers.1.feed_forward.experts.w2.weight")
    )


def first_release(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of a mixture as the first release of Mixtral stores them: stacked by rows, w2 transposed."""
    result = {
        name.replace("feed_forward.gate", "block_sparse_moe.gate"): t
        for name, t in tensors.items()
        if "experts" not in name
    }
    for i in range(PARAMS["n_layers"]):
        for x in "123":
            experts = [tensors[f"layers.{i}.feed_forward.experts.{e}.w{x}.weight"] for e in range(MOE["num_experts"])]
            result[f"layers.{i}.block_sparse_moe.w{x}"] = torch.cat(
                [t.T if x == "2" else t for t in experts]
            ).contiguous()
    return result


def write_pt(folder: Path, tensors: dict[str, torch.Tensor], count: int = 8) -> None:
    for i, held in enumerate(split(tensors, count)):
        torch.save(held, folder / f"consolidated.{i:02d}.pt")


def test_the_first_release_of_mixtral(tmp_path):
    params = PARAMS | {"moe": MOE}
    tensors = raw_tensors(params, dtype=torch.bfloat16)
    write_raw(tmp_path / "today", params, tensors)
    first = write_raw(tmp_path / "first", params, {})
    (first / "consolidated.safetensors").unlink()
    write_pt(first, first_release(tensors))
    assert assert_same(first, tmp_path / "today") == ()


def test_raw_weights_beside_a_config(bare, tiny, state):
    save_file(raw_of_transformers(state, 4, 2), bare / "consolidated.safetensors")
    assert_same(bare, tiny)


@pytest.mark.parametrize("count", [1, 3])
def test_shards_of_mistrals_own_format(tmp_path, count):
    tensors = raw_tensors(PARAMS)
    write_raw(tmp_path / "one", PARAMS, tensors)
    folder = write_raw(tmp_path / "many", PARAMS, {})
    (folder / "consolidated.safetensors").unlink()
    weight_map = {}
    for i, held in enumerate(split(tensors, count), 1):
        name = f"consolidated-{i:05d}-of-{count:05d}.safetensors"
        save_file(held, folder / name)
        weight_map |= dict.fromkeys(held, name)
    assert_same(folder, tmp_path / "one")
    write_index(folder, weight_map, "consolidated.safetensors.index.json")
    assert assert_same(folder, tmp_path / "one") == ()


def test_a_stack_that_no_number_of_experts_divides(tmp_path):
    params = PARAMS | {"moe": MOE}
    folder = write_raw(tmp_path, params, {})
    (folder / "consolidated.safetensors").unlink()
    tensors = first_release(raw_tensors(params))
    write_pt(folder, tensors | {"layers.1.block_sparse_moe.w1": torch.zeros(159, 24)})
    assert "layers.1.block_sparse_moe.w1 has shape (159, 24) for 4 experts" in refused(folder)
    for router, said in ((torch.tensor(1.0), 0), (torch.zeros(10**6, 0), 10**6)):
        write_pt(folder, tensors | {"layers.1.block_sparse_moe.gate.weight": router})
        assert f"{folder}: layers.1.block_sparse_moe.w1 has shape (160, 24) for {said} experts" in refused(folder)


def test_merged_weights_of_mistral_finetune(tmp_path):
    training = {"enable": True, "rank": 16, "dropout": 0.0, "scaling": 2.0}
    tensors = raw_tensors(PARAMS)
    write_raw(tmp_path / "plain", PARAMS, tensors)
    merged = write_raw(tmp_path / "merged", PARAMS | {"lora": training, "moe": None}, tensors)
    assert assert_same(merged, tmp_path / "plain") == ()
    adapter = {"layers.0.attention.wq.lora_A.weight": torch.zeros(16, 24)}
    write_raw(tmp_path / "merged", PARAMS | {"lora": training}, tensors | adapter)
    assert "part of an adapter that is not merged" in refused(merged)
