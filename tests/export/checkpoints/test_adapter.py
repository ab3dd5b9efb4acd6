"""Adapters are merged as peft merges them: its formula in torch, on numbers whose sums are exact in float32."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoints.adapters.adapter import adapter_files
from export.checkpoints.checkpoint import Checkpoint, open_checkpoint
from export.checkpoints.source import identity
from runtime.errors import UserError
from tests.helpers.raw_mistral import PARAMS, raw_tensors, write_raw
from tests.helpers.tiny import write_tiny_mistral

Tensors = dict[str, torch.Tensor]
RANK, ALPHA = 4, 12
WQ, WO, DOWN = (f"model.layers.{place}" for place in ("0.self_attn.q_proj", "1.self_attn.o_proj", "0.mlp.down_proj"))
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
SHAPES = {WQ: (64, 64), WO: (64, 64), DOWN: (64, 96), HEAD: (320, 64)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OURS = {WO: "layers.1.attention.wo.weight", DOWN: "layers.0.feed_forward.w2.weight", HEAD: "output.weight"}


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def base(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "base"
    write_tiny_mistral(folder, dtype=request.param)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "plain"
    write_tiny_mistral(folder, dtype=torch.bfloat16)
    return folder


def small(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Multiples of 1/64 whose products and sums are exact in float32, in whatever order they are added."""
    return torch.randint(-31, 32, shape, generator=torch.Generator().manual_seed(seed)) / 64


def pair(module: str, rank: int = RANK, shape: tuple[int, int] | None = None) -> Tensors:
    rows, columns = shape or SHAPES[module]
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": small((rank, columns), 1), f"{name}.lora_B.weight": small((rows, rank), 2)}


def write_adapter(folder: Path, tensors: Tensors, **config: Any) -> Path:
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "base_model_name_or_path": "mistralai/tiny", "bias": "none", "r": RANK}
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"lora_alpha": ALPHA} | config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def merge(base: Path, adapter: Path) -> Checkpoint:
    return open_checkpoint(base, "auto", {}, adapter=adapter)


def by_peft(weight: torch.Tensor, down: torch.Tensor, up: torch.Tensor, scaling: float) -> torch.Tensor:
    """`Linear.merge` of peft: the update is float32, and is added in place to a weight that keeps its dtype."""
    merged = weight.clone()
    merged += (up.float() @ down.float()) * scaling
    return merged


def equal(ours: np.ndarray, theirs: torch.Tensor) -> bool:
    return ours.dtype.name == str(theirs.dtype).removeprefix("torch.") and np.array_equal(
        ours.astype(np.float32), theirs.float().numpy()
    )


def stored(base: Path, module: str) -> torch.Tensor:
    return load_file(base / "model.safetensors")[f"{module}.weight"]


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_merged_matrix_is_that_of_peft(base, tmp_path, adapter_dtype):
    tensors = {
        name: tensor.to(adapter_dtype) for module in (WQ, WO, DOWN, HEAD) for name, tensor in pair(module).items()
    }
    checkpoint = merge(base, write_adapter(tmp_path / "a", tensors))
    before = open_checkpoint(base, "auto", {})
    for module, ours in OURS.items():
        down, up = pair(module).values()
        assert equal(checkpoint.tensor(ours), by_peft(stored(base, module), down, up, ALPHA / RANK)), module
        assert not np.array_equal(checkpoint.tensor(ours), before.tensor(ours))
    fused = checkpoint.tensor("layers.0.attention.wqkv.weight")
    assert equal(fused[:64], by_peft(stored(base, WQ), *pair(WQ).values(), ALPHA / RANK))
    unchanged = [name for name in before.names() if name not in (*OURS.values(), "layers.0.attention.wqkv.weight")]
    assert all(np.array_equal(checkpoint.tensor(name), before.tensor(name)) for name in unchanged)
    assert np.array_equal(fused[64:], before.tensor("layers.0.attention.wqkv.weight")[64:])
    (note,) = checkpoint.notes
    assert note.startswith(f"the adapter {tmp_path / 'a'} is merged (matrices changed: 4, tensors replaced: 0); the")


def test_rows_in_blocks_are_the_rows_of_the_whole(plain, tmp_path, monkeypatch):
    adapter = write_adapter(tmp_path / "a", pair(DOWN))
    expected = merge(plain, adapter).tensor(OURS[DOWN])
    monkeypatch.setattr("export.checkpoints.adapters.lora.ELEMENTS_AT_ONCE", 96 * 7)
    assert np.array_equal(merge(plain, adapter).tensor(OURS[DOWN]), expected)
    monkeypatch.setattr("export.checkpoints.checkpoint.BLOCK_ELEMENTS", 96 * 5)
    assert np.array_equal(merge(plain, adapter).tensor(OURS[DOWN]), expected)


SCALINGS: dict[str, tuple[dict[str, Any], float]] = {
    "alpha / r": ({}, ALPHA / RANK),
    "rslora": ({"use_rslora": True}, ALPHA / math.sqrt(RANK)),
    "alpha of a kind of module": ({"alpha_pattern": {"q_proj": 1, "o_proj": 20}}, 20 / RANK),
    "alpha of one module": (
        {"alpha_pattern": {"layers.0.self_attn.o_proj": 1, r"layers\.1\.self_attn\.o_proj": 7}},
        7 / RANK,
    ),
    "alpha from the start of the name": ({"alpha_pattern": {"^model.layers.1.self_attn.o_proj": 7}}, 7 / RANK),
    "alpha of a name's end alone": ({"alpha_pattern": {"proj": 7}}, ALPHA / RANK),
    "rank of a module": ({"r": 64, "rank_pattern": {"o_proj": RANK}}, ALPHA / RANK),
}


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings(plain, tmp_path, name):
    config, scaling = SCALINGS[name]
    checkpoint = merge(plain, write_adapter(tmp_path / "a", pair(WO), **config))
    assert equal(checkpoint.tensor(OURS[WO]), by_peft(stored(plain, WO), *pair(WO).values(), scaling))


@pytest.mark.parametrize("suffix", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_dora(base, tmp_path, suffix):
    """`DoraLinearVariant.merge_unsafe` of peft; norms are sums, so the last bit of float32 may differ."""
    magnitude = small((64,), 3).abs() + 1
    tensors = pair(WO) | {f"base_model.model.{WO}.{suffix}": magnitude}
    ours = merge(base, write_adapter(tmp_path / "a", tensors, use_dora=True)).tensor(OURS[WO]).astype(np.float32)
    weight = stored(base, WO)
    down, up = pair(WO).values()
    total = weight + (up @ down) * (ALPHA / RANK)
    theirs = ((magnitude / torch.linalg.norm(total, dim=1))[:, None] * total).to(weight.dtype)
    one_rounding = {torch.float32: 2**-21, torch.float16: 2**-10, torch.bfloat16: 2**-7}[weight.dtype]
    np.testing.assert_allclose(ours, theirs.float().numpy(), rtol=one_rounding, atol=1e-7)


def test_embeddings(plain, tmp_path):
    """`Embedding.merge` of peft: the product is transposed, and rounded before it is added."""
    down, up = small((RANK, 320), 1), small((64, RANK), 2)
    name = f"base_model.model.{EMBEDDING}.lora_embedding"
    checkpoint = merge(plain, write_adapter(tmp_path / "a", {f"{name}_A": down, f"{name}_B": up}))
    expected = stored(plain, EMBEDDING).clone()
    expected += ((up @ down).T * (ALPHA / RANK)).bfloat16()
    assert equal(checkpoint.tensor("tok_embeddings.weight"), expected)


def test_modules_to_save_replace_those_of_the_base(plain, tmp_path):
    head, embedding = small((320, 64), 1) + 2**-20, small((320, 64), 2)
    tensors = {
        f"base_model.model.{HEAD}.weight": head,
        f"base_model.model.{EMBEDDING}.base_layer.weight": embedding,
        f"base_model.model.{EMBEDDING}.lora_embedding_A": small((RANK, 320), 3),
        f"base_model.model.{EMBEDDING}.lora_embedding_B": small((64, RANK), 4),
    }
    checkpoint = merge(plain, write_adapter(tmp_path / "a", tensors, modules_to_save=["lm_head"]))
    assert equal(checkpoint.tensor("output.weight"), head.bfloat16())
    expected = embedding.bfloat16()
    expected += ((small((64, RANK), 4) @ small((RANK, 320), 3)).T * (ALPHA / RANK)).bfloat16()
    assert equal(checkpoint.tensor("tok_embeddings.weight"), expected)


def test_a_head_of_the_adapter_unties_that_of_the_base(tmp_path):
    write_tiny_mistral(tmp_path / "tied", tie_word_embeddings=True)
    adapter = write_adapter(tmp_path / "a", {f"base_model.model.{HEAD}.weight": small((320, 64), 1)})
    checkpoint = merge(tmp_path / "tied", adapter)
    assert not checkpoint.model.tied_embeddings
    assert equal(checkpoint.tensor("output.weight"), small((320, 64), 1))


@pytest.mark.parametrize("prefix", ["", "model.language_model.", "language_model.model."])
def test_an_adapter_with_another_prefix(plain, tmp_path, prefix):
    """As in peft's models of a bare `MistralModel`, and of models that also see images."""
    tensors = {name.replace("model.layers", f"{prefix}layers"): tensor for name, tensor in pair(WO).items()}
    checkpoint = merge(plain, write_adapter(tmp_path / "a", tensors))
    assert equal(checkpoint.tensor(OURS[WO]), by_peft(stored(plain, WO), *pair(WO).values(), ALPHA / RANK))


def test_an_adapter_in_a_bin_file(plain, tmp_path):
    adapter = write_adapter(tmp_path / "a", {})
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(pair(WO), adapter / "adapter_model.bin")
    checkpoint = merge(plain, adapter)
    assert equal(checkpoint.tensor(OURS[WO]), by_peft(stored(plain, WO), *pair(WO).values(), ALPHA / RANK))


def test_an_adapter_of_mistral_finetune(tmp_path):
    tensors = raw_tensors(PARAMS, dtype=torch.bfloat16)
    base = write_raw(tmp_path / "base", PARAMS, tensors)
    wo, wq = "layers.1.attention.wo", "layers.0.attention.wq"
    down, up = small((4, 32), 1), small((24, 4), 2)
    norm = small((24,), 5)
    adapter = write_raw(tmp_path / "adapter", PARAMS | {"lora": {"enable": True, "rank": 4, "scaling": 1.5}}, {})
    (adapter / "consolidated.safetensors").unlink()
    rotary = {f"{wq}.lora_A.weight": small((4, 24), 3), f"{wq}.lora_B.weight": small((32, 4), 4)}
    half = {f"{wo}.lora_A.weight": down, f"{wo}.lora_B.weight": up, "norm.weight": norm}
    save_file(half | rotary, adapter / "lora.safetensors")
    checkpoint = open_checkpoint(base, "auto", {}, adapter=adapter)
    assert equal(checkpoint.tensor(f"{wo}.weight"), by_peft(tensors[f"{wo}.weight"], down, up, 1.5))
    assert equal(checkpoint.tensor("norm.weight"), norm.bfloat16())
    merged = by_peft(tensors[f"{wq}.weight"], *rotary.values(), 1.5)
    by_hand = write_raw(tmp_path / "by-hand", PARAMS, tensors | {f"{wq}.weight": merged})
    ours, theirs = checkpoint, open_checkpoint(by_hand, "auto", {})
    name = "layers.0.attention.wqkv.weight"
    assert np.array_equal(ours.tensor(name), theirs.tensor(name))
    save_file(half | {f"{wq}.lora_A.weight": small((4, 24), 3)}, adapter / "lora.safetensors")
    assert f"has no pair of matrices around {wq}.lora_B.weight" in refused(base, adapter)


def refused(base: Path, adapter: Path) -> str:
    with pytest.raises(UserError) as caught:
        merge(base, adapter)
    assert "\n" not in str(caught.value)
    return str(caught.value)


BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "has peft_type: 'IA3', expected 'LORA'": {"peft_type": "IA3"},
    "has peft_type: None": {"peft_type": None},
    "has fan_in_fan_out: True, which is not supported": {"fan_in_fan_out": True},
    "has lora_bias: True": {"lora_bias": True},
    "has layer_replication: [[0, 1]]": {"layer_replication": [[0, 1]]},
    "has target_parameters: ['mlp.experts.gate_up_proj']": {"target_parameters": ["mlp.experts.gate_up_proj"]},
    "has alora_invocation_tokens: [1]": {"alora_invocation_tokens": [1]},
    "has use_qalora: True": {"use_qalora": True},
    "has init_lora_weights: 'pissa_niter_16', which changed the base as well": {"init_lora_weights": "pissa_niter_16"},
    "has a rank of 4, expected 8 or 16 by adapter_config.json": {"r": 8, "rank_pattern": {"q_proj": 16}},
    "has '(a+)+' in alpha_pattern, expected names of modules": {"alpha_pattern": {"(a+)+": 3}},
    "holds lora_A, lora_B of model.layers.1.self_attn.o_proj, expected lora_A and lora_B and lora_mag": {
        "use_dora": True
    },
    "is malformed: Expected `float`, got `str` - at `$.lora_alpha`": {"lora_alpha": "x"},
}


@pytest.mark.parametrize("message", BAD_CONFIGS)
def test_settings_that_are_refused(plain, tmp_path, message):
    assert message in refused(plain, write_adapter(tmp_path / "a", pair(WO), **BAD_CONFIGS[message]))


def test_settings_that_change_nothing(plain, tmp_path):
    config = {"use_dora": False, "fan_in_fan_out": False, "target_parameters": None, "init_lora_weights": "gaussian"}
    unknown = {"target_modules": ["o_proj"], "lora_dropout": 0.1, "peft_version": "0.18.0", "corda_config": None}
    checkpoint = merge(plain, write_adapter(tmp_path / "a", pair(WO), **config, **unknown))
    assert equal(checkpoint.tensor(OURS[WO]), by_peft(stored(plain, WO), *pair(WO).values(), ALPHA / RANK))


NAN = {name: tensor * math.nan for name, tensor in pair(WO).items()}
BAD_TENSORS: dict[str, Tensors] = {
    "changes model.layers.7.self_attn.q_proj.weight, which frontend.checkpoint does not hold, expected the tensors of "
    "mistralai/tiny": pair("model.layers.7.self_attn.q_proj", shape=(64, 64)),
    "lora_A.weight has shape (4, 80), expected (4, 64) by frontend.checkpoint": pair(WO, shape=(64, 80)),
    "lora_B.weight has shape (80, 4), expected (64, 4)": pair(WO, shape=(80, 64)),
    "holds lora_A of model.layers.1.self_attn.o_proj": dict(list(pair(WO).items())[:1]),
    "lm_head.weight has shape (321, 64), expected (320, 64)": {f"base_model.model.{HEAD}.weight": torch.zeros(321, 64)},
    "has dtype int8, expected float32": {name: tensor.to(torch.int8) for name, tensor in pair(WO).items()},
    "frontend.checkpoint; if tokens were added in training, merge the adapter with peft into a base that was resized": {
        f"base_model.model.{HEAD}.weight": torch.zeros(322, 64)
    },
    "trains model.layers.0.self_attn.q_proj.bias, expected no biases": {f"base_model.model.{WQ}.bias": torch.zeros(64)},
    "lora_A.weight has shape (4,), expected": {name: torch.zeros(4) for name in pair(WO)},
    "has a rank of 0": {name: torch.zeros(0, 0) for name in pair(WO)},
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_tensors_that_do_not_fit(plain, tmp_path, message):
    assert message in refused(plain, write_adapter(tmp_path / "a", BAD_TENSORS[message]))


def test_numbers_that_are_not_finite(plain, tmp_path):
    with pytest.raises(UserError, match=r"a: the tensor base_model.*lora_B.weight holds a NaN"):
        merge(plain, write_adapter(tmp_path / "a", NAN)).tensor(OURS[WO])


def test_an_adapter_for_another_format(tmp_path):
    base = write_raw(tmp_path / "raw", PARAMS, raw_tensors(PARAMS))
    said = refused(base, write_adapter(tmp_path / "a", pair(WO)))
    assert "named and ordered as those of a Hugging Face folder, but frontend.checkpoint is of the type mistral" in said


def test_folders_that_are_no_adapter(plain, tmp_path):
    assert "which is not a folder" in refused(plain, tmp_path / "none")
    assert "has neither adapter_config.json nor lora.safetensors" in refused(plain, plain)
    adapter = write_adapter(tmp_path / "a", {})
    (adapter / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\nsize 9\n")
    assert "adapter_model.safetensors is a Git LFS pointer" in refused(plain, adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert "has neither adapter_model.safetensors nor adapter_model.bin" in refused(plain, adapter)


def test_an_adapter_that_changes_nothing_is_refused(plain, tmp_path):
    with pytest.raises(UserError, match="which holds no tensors; fetch the adapter again"):
        merge(plain, write_adapter(tmp_path / "a", {}))
    with pytest.raises(UserError, match="Expected `int` >= 1"):
        merge(plain, write_adapter(tmp_path / "b", pair(WO), r=0))


def test_identity_follows_the_adapter(tmp_path):
    adapter = write_adapter(tmp_path / "a", pair(WO))
    before = identity(adapter_files(adapter))
    (adapter / "README.md").write_text("x")
    assert identity(adapter_files(adapter)) == before
    write_adapter(adapter, pair(WO), lora_alpha=13)
    assert identity(adapter_files(adapter)) != before
