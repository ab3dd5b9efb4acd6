"""Quantized matrices in every kind of checkpoint: mixtures, beside image encoders, Mistral's own format, adapters."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

from export.checkpoints.checkpoint import open_checkpoint
from export.checkpoints.encodings.encoding import decoded
from runtime.errors import UserError
from tests.helpers.families import FAMILIES
from tests.helpers.quantized_checkpoints import FORMS, write_quantized
from tests.helpers.quantized_matrices import gptq
from tests.helpers.raw_mistral import PARAMS, raw_tensors, write_raw
from tests.helpers.tiny import write_tiny_mistral

UP = "model.layers.0.mlp.up_proj"
Q = "model.layers.0.self_attn.q_proj"
WQKV, W13 = "layers.0.attention.wqkv.weight", "layers.0.feed_forward.w13.weight"
RAW = PARAMS | {"dim": 64, "head_dim": 16, "hidden_dim": 96, "n_layers": 1}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("quantized") / "tiny"
    write_tiny_mistral(folder, hidden_size=128, intermediate_size=256, num_hidden_layers=1, dtype=torch.bfloat16)
    return folder


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, change) -> None:
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def carried(ours, name: str) -> np.ndarray:
    encoding = ours.encoding(name)
    return np.concatenate([decoded(rows, encoding) for rows in ours.encoded_blocks(name, encoding)])


@pytest.mark.parametrize("form", ["gptq-4-asymmetric", "awq", "compressed-4-asymmetric", "fp8-blocks", "nf4"])
def test_experts(tmp_path, form):
    """Each has its own tensors; the router is not quantized."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_local_experts": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96}
    MixtralForCausalLM(MixtralConfig(**sizes, **heads)).save_pretrained(tmp_path / "tiny")
    exact = write_quantized(tmp_path / "tiny", tmp_path / "x", FORMS[form])
    assert len(exact) == 4 + 12
    ours = open_checkpoint(tmp_path / "x", "auto", {})
    parts = [exact[f"model.layers.0.block_sparse_moe.experts.{e}.{w}.weight"] for e in range(4) for w in ("w1", "w3")]
    name = "layers.0.feed_forward.experts.w13.weight"
    assert np.array_equal(ours.tensor(name), np.concatenate(parts))
    assert form == "nf4" or np.array_equal(carried(ours, name), np.concatenate(parts))


@pytest.mark.parametrize("form", ["compressed-4-asymmetric", "compressed-int8", "fp8", "fp8-rows", "gptq-8-asymmetric"])
def test_mistrals_own_format_reorders_rotary_rows_with_their_scales(tmp_path, form):
    write_raw(tmp_path / "tiny", RAW, raw_tensors(RAW))
    exact = write_quantized(tmp_path / "tiny", tmp_path / "x", FORMS[form])
    ours = open_checkpoint(tmp_path / "x", "auto", {})
    wq = exact["layers.0.attention.wq.weight"]
    halves = wq.reshape(4, 8, 2, 64).transpose(0, 2, 1, 3).reshape(64, 64)  # neighbouring pairs of each head, apart
    assert np.array_equal(ours.tensor(WQKV)[:64], halves)
    assert np.array_equal(carried(ours, WQKV), ours.tensor(WQKV))


def test_a_quantization_that_mistrals_own_format_does_not_have(tmp_path):
    write_raw(tmp_path / "x", RAW | {"quantization": {"qformat_weight": "int3"}}, raw_tensors(RAW))
    with pytest.raises(UserError, match=r"has quantization: \{'qformat_weight': 'int3'\}, which is not"):
        open_checkpoint(tmp_path / "x", "auto", {})


def test_the_text_part_of_a_model_that_also_sees_images(tmp_path):
    FAMILIES["ministral-3"].write(tmp_path / "tiny")
    edit(tmp_path / "tiny", lambda t: t.update({"vision_tower.x.weight": torch.ones(1)}))
    exact = write_quantized(tmp_path / "tiny", tmp_path / "x", FORMS["fp8"])
    text = {name: values for name, values in exact.items() if "language_model" in name}
    assert text
    assert len(text) < len(exact)
    ours = open_checkpoint(tmp_path / "x", "auto", {})
    (up,) = [values for name, values in text.items() if "up_proj" in name]
    assert np.array_equal(ours.tensor(W13)[len(up) :], up)
    assert [note.partition(" ")[0] for note in ours.notes] == ["the", "FP8"]


def test_an_adapter_changes_what_the_quantized_numbers_mean(tiny, tmp_path):
    exact = write_quantized(tiny, tmp_path / "x", FORMS["gptq-4-asymmetric"])
    folder = tmp_path / "adapter"
    folder.mkdir()
    down, up = torch.full((1, 128), 0.5), torch.arange(256).float()[:, None]
    name = f"base_model.model.{UP}"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "bias": "none", "r": 1, "lora_alpha": 2}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    ours = open_checkpoint(tmp_path / "x", "auto", {}, adapter=folder)
    assert np.array_equal(ours.tensor(W13)[256:], exact[f"{UP}.weight"] + np.arange(256, dtype=np.float32)[:, None])
    assert ours.source.tensors[f"{UP}.weight"].packing is None
    assert ours.encoding(W13) is None
    assert np.array_equal(carried(ours, WQKV), ours.tensor(WQKV))  # which the adapter leaves as it is


def test_orders_of_columns_that_differ_cannot_be_carried_together(tiny, tmp_path):
    exact = write_quantized(tiny, tmp_path / "x", FORMS["gptq-4-act-order"])
    packed, other = gptq("other", exact[f"{Q}.weight"], act_order=True)
    edit(tmp_path / "x", lambda t: t.update({f"{Q}.{ending}": v.contiguous() for ending, v in packed.items()}))
    ours = open_checkpoint(tmp_path / "x", "auto", {})
    assert ours.encoding(WQKV) is None
    assert np.array_equal(ours.tensor(WQKV)[:64], other)
    assert ours.encoding(W13) is not None


@pytest.mark.parametrize(("bits", "numbers"), [(4, "int4"), (8, "int8")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_zero_points_that_are_one_above_the_largest_number(tiny, tmp_path, bits, numbers, dtype):
    """What the first format of GPTQ stores as the largest number: minimums hold it, where they are exact."""
    write_quantized(tiny, tmp_path / "x", FORMS["gptq-4-asymmetric" if bits == 4 else "gptq-8-asymmetric"])

    def change(tensors):
        tensors[f"{UP}.scales"] = tensors[f"{UP}.scales"].to(dtype) * 1.1
        tensors[f"{UP}.qzeros"].view(torch.uint8)[:] = 0xFF

    edit(tmp_path / "x", change)
    ours = open_checkpoint(tmp_path / "x", "auto", {})
    stored = load_file(tmp_path / "x" / "model.safetensors")
    packed = stored[f"{UP}.qweight"].T.contiguous().view(torch.uint8).numpy()
    q = packed if bits == 8 else np.stack([packed & 15, packed >> 4], axis=-1).reshape(256, 128)
    scales = np.repeat(stored[f"{UP}.scales"].float().numpy().T, 32, axis=1)
    expected = scales * (q.astype(np.float32) - 2**bits)
    assert np.array_equal(ours.source.read(f"{UP}.weight", slice(0, 256)), expected)
    matrix = ours.source.tensors[f"{UP}.weight"].encoded
    assert (matrix is None) == (dtype == torch.float32)
    if matrix is not None:
        assert (matrix.encoding.numbers, matrix.encoding.scales, matrix.encoding.offsets) == (
            numbers, "float32", "minimums",
        )  # fmt: skip
        assert np.array_equal(decoded(matrix.read(slice(0, 256)), matrix.encoding), expected)
    assert f"{UP}.qzeros has zero points whose stored bits are all ones; they are read as {2**bits}" in ours.notes[-1]


def test_biases_of_gptq_are_dropped_only_if_they_are_zero(tiny, tmp_path):
    write_quantized(tiny, tmp_path / "x", FORMS["gptq-4"])
    assert f"{UP}.bias" in load_file(tmp_path / "x" / "model.safetensors")
    assert f"{UP}.bias" not in open_checkpoint(tmp_path / "x", "auto", {}).source.tensors
    edit(tmp_path / "x", lambda t: t[f"{UP}.bias"][3:4].fill_(0.5))
    with pytest.raises(UserError, match=f"holds the tensor {UP}.bias, which has no place"):
        open_checkpoint(tmp_path / "x", "auto", {})


@pytest.mark.parametrize("form", ["gptq-4-asymmetric", "nf4-nested", "compressed-int8"])
def test_a_file_pickled_by_torch(tiny, tmp_path, form):
    exact = write_quantized(tiny, tmp_path / "x", FORMS[form])
    torch.save(load_file(tmp_path / "x" / "model.safetensors"), tmp_path / "x" / "pytorch_model.bin")
    (tmp_path / "x" / "model.safetensors").unlink()
    ours = open_checkpoint(tmp_path / "x", "auto", {})
    assert np.array_equal(ours.tensor(W13)[256:], exact[f"{UP}.weight"])
    assert form == "nf4-nested" or np.array_equal(carried(ours, W13), ours.tensor(W13))


@pytest.mark.parametrize("settings", [[], {"quant_method": []}, {"quant_method": "gptq", "bits": "4"}, 4])
def test_settings_of_another_type(tiny, tmp_path, settings):
    write_quantized(tiny, tmp_path / "x", FORMS["gptq-4"])
    edit_json(tmp_path / "x" / "config.json", lambda config: config.update(quantization_config=settings))
    with pytest.raises(UserError):
        open_checkpoint(tmp_path / "x", "auto", {})


FILES = {  # the form, and the file beside config.json in which its software writes the settings
    "gptq-4-act-order": ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": True}),
    "awq": ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
}


@pytest.mark.parametrize("form", FILES)
def test_settings_in_a_file_beside_config_json(tiny, tmp_path, form):
    exact = write_quantized(tiny, tmp_path / "x", FORMS[form])
    edit_json(tmp_path / "x" / "config.json", lambda config: config.pop("quantization_config"))
    with pytest.raises(
        UserError, match=r"quantized by GPTQ or AWQ, as the tensor .*, but no quantization_config says how"
    ):
        open_checkpoint(tmp_path / "x", "auto", {})
    name, settings = FILES[form]
    (tmp_path / "x" / name).write_text(json.dumps(settings))
    ours = open_checkpoint(tmp_path / "x", "auto", {})
    assert np.array_equal(ours.tensor(W13)[256:], exact[f"{UP}.weight"])


def test_g_idx_of_neighbours_is_no_order(tiny, tmp_path):
    write_quantized(tiny, tmp_path / "x", FORMS["gptq-4"])
    edit_json(tmp_path / "x" / "config.json", lambda config: config["quantization_config"].update(desc_act=True))
    assert open_checkpoint(tmp_path / "x", "auto", {}).encoding(W13).order is None
    edit(
        tmp_path / "x", lambda t: [t.pop(name) for name in list(t) if name.endswith("g_idx")]
    )  # as older files have it
    assert open_checkpoint(tmp_path / "x", "auto", {}).encoding(W13).order is None


def test_groups_of_compressed_tensors_with_settings_of_their_own(tiny, tmp_path):
    """One in 4 bits and groups of 32, one in int8 with a scale for each row, and one left as it was."""
    four = write_quantized(tiny, tmp_path / "four", FORMS["compressed-4"])
    eight = write_quantized(tiny, tmp_path / "eight", FORMS["compressed-int8"])
    folder = Path(shutil.copytree(tmp_path / "four", tmp_path / "x"))
    plain, other = (load_file(f / "model.safetensors") for f in (tiny, tmp_path / "eight"))

    def change(tensors):
        for module, source in ((UP, other), ("model.layers.0.mlp.gate_proj", other), (Q, plain)):
            for name in [name for name in tensors if name.startswith(f"{module}.")]:
                del tensors[name]
            tensors.update({name: value for name, value in source.items() if name.startswith(f"{module}.")})

    edit(folder, change)
    rows = {"weights": {"num_bits": 8, "strategy": "channel"}, "format": "int-quantized"}
    edit_json(
        folder / "config.json",
        lambda config: config["quantization_config"].update(
            format="mixed-precision", config_groups=config["quantization_config"]["config_groups"] | {"group_1": rows}
        ),
    )
    ours = open_checkpoint(folder, "auto", {})
    assert np.array_equal(carried(ours, W13)[256:], eight[f"{UP}.weight"])
    down = "layers.0.feed_forward.w2.weight"
    assert np.array_equal(carried(ours, down), four["model.layers.0.mlp.down_proj.weight"])
    assert ours.encoding(WQKV) is None  # one of its parts is plain
    assert np.array_equal(ours.tensor(WQKV)[:64], plain[f"{Q}.weight"].float().numpy())
