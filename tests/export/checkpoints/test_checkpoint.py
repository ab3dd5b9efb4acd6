import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from export.checkpoints.checkpoint import half_split_rows, open_checkpoint
from export.checkpoints.location import checkpoint_files
from export.checkpoints.source import identity
from runtime.errors import UserError
from tests.helpers.tiny import write_tiny_mistral

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    write_tiny_mistral(folder, num_hidden_layers=3)
    return folder


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def change_tensors(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"
BAD_TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    f"lacks the tensor {Q}, which": lambda t: {k: v for k, v in t.items() if k != Q},
    "lacks the tensor .* and 6 more": lambda t: {
        k: v for k, v in t.items() if "q_proj" not in k and "mlp.up" not in k and k != "lm_head.weight"
    },
    "holds the tensor model.layers.1.self_attn.q_proj.bias, which has no place in a mistral model": lambda t: (
        t | {Q.replace("weight", "bias"): torch.zeros(64)}
    ),
    "holds the tensor model.layers.3.x and 1 more": lambda t: (
        t | {"model.layers.3.x": torch.zeros(1), "model.layers.3.y": torch.zeros(1)}
    ),
    rf"{Q} has shape \(64, 65\), expected \(64, 64\) by .*config.json": lambda t: t | {Q: torch.zeros(64, 65)},
    rf"{Q} has shape \(4096,\), expected \(64, 64\)": lambda t: t | {Q: torch.zeros(4096)},
    f"{Q} has dtype int8, expected one of float32, float16, bfloat16": lambda t: (
        t | {Q: torch.zeros(64, 64, dtype=torch.int8)}
    ),
}


@pytest.mark.parametrize("message", BAD_TENSORS)
def test_every_tensor_is_accounted_for(copy, message):
    change_tensors(copy, BAD_TENSORS[message])
    with pytest.raises(UserError, match=message) as caught:
        open_checkpoint(copy, "auto", {})
    assert str(copy) in str(caught.value)


def test_float64_is_read_as_float32(tiny, copy):
    change_tensors(copy, lambda t: {name: tensor.double() for name, tensor in t.items()})
    ours, theirs = open_checkpoint(copy, "auto", {}), open_checkpoint(tiny, "auto", {})
    for name in theirs.names():
        assert ours.dtype(name) == "float32"
        assert {str(block.dtype) for block in ours.blocks(name)} == {"float32"}
        assert np.array_equal(ours.tensor(name), theirs.tensor(name))


def test_overrides_replace_fields(tiny):
    plain = open_checkpoint(tiny, "auto", {}).model
    changed = open_checkpoint(
        tiny, "auto", {"sliding_window": 8, "rope_theta": 2e4, "norm_eps": 1e-3, "context_length": 77}
    ).model
    assert (changed.sliding_window, changed.rope_theta, changed.norm_eps, changed.context_length) == (
        (8, 8, 8),
        2e4,
        1e-3,
        77,
    )
    assert (plain.sliding_window, plain.rope_theta, plain.norm_eps, plain.context_length) == (
        (32, 32, 32),
        1e4,
        1e-5,
        512,
    )
    assert open_checkpoint(tiny, "auto", {"sliding_window": None}).model.sliding_window == (None, None, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"window": 64},
            "has the field 'window', expected one of context_length, norm_eps, rope_theta, sliding_window",
        ),
        ({"dim": 64}, "has the field 'dim'"),
        (
            {"sliding_window": "64"},
            "with frontend.overrides, does not describe a model: Expected `int | null`, got `str`",
        ),
        ({"sliding_window": True}, "got `bool`"),
        ({"rope_theta": -1.0}, "rope_theta of -1.0, expected a positive number"),
        ({"rope_theta": None}, "lacks rope_theta"),
        ({"norm_eps": float("nan")}, "norm_eps of nan"),
    ],
)
def test_bad_overrides(tiny, overrides, message):
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        open_checkpoint(tiny, "auto", overrides)


def test_kinds(tiny, tmp_path):
    assert open_checkpoint(tiny, "huggingface", {}).model == open_checkpoint(tiny, "auto", {}).model
    with pytest.raises(UserError, match=r"frontend.type is 'onnx', expected one of auto, huggingface, mistral, gguf"):
        open_checkpoint(tiny, "onnx", {})
    with pytest.raises(UserError, match="does not exist"):
        open_checkpoint(tmp_path / "none", "auto", {})
    with pytest.raises(UserError, match="holds no checkpoint of a known format"):
        open_checkpoint(tmp_path, "auto", {})
    with pytest.raises(UserError, match=r"has no config.json"):
        open_checkpoint(tmp_path, "huggingface", {})


def test_identity_follows_the_files(tiny, copy):
    before = identity(checkpoint_files(tiny))
    assert len(before) == 64
    assert identity(checkpoint_files(copy)) == before
    (copy / "tokenizer_config.json").write_text("{}")
    assert identity(checkpoint_files(copy)) != before
    shutil.copy(tiny / "tokenizer_config.json", copy)
    change_tensors(copy, lambda t: t | {Q: t[Q] + 1})
    assert identity(checkpoint_files(copy)) != before


def test_identity_of_a_large_file_follows_its_time(tmp_path):
    write_tiny_mistral(tmp_path / "x", vocab_size=70_000)  # 36 MB: too large to be hashed whole
    before = identity(checkpoint_files(tmp_path / "x"))
    os.utime(tmp_path / "x" / "model.safetensors", ns=(1, 1))
    assert identity(checkpoint_files(tmp_path / "x")) != before


def test_half_split_rows_rotate_as_neighbours_did():
    """Scores of queries and keys after our rotation are those of neighbours rotated as complex numbers.

    See Su et al., 2021.
    """
    heads, head_dim, columns, positions = 3, 8, 5, 4
    generator = torch.Generator().manual_seed(0)
    wq, wk = torch.randn(2, heads * head_dim, columns, generator=generator)
    x = torch.randn(positions, columns, generator=generator)
    # (positions, head_dim / 2)
    angles = torch.arange(positions)[:, None] * (10000.0 ** -(torch.arange(head_dim // 2) / (head_dim // 2)))

    def by_complex(w: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex((x @ w.T).view(positions, heads, head_dim // 2, 2))
        return (
            torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None])
            .flatten(-2)
            .transpose(0, 1)
        )

    def split(w: torch.Tensor) -> torch.Tensor:
        return (
            (x @ torch.from_numpy(half_split_rows(w.numpy(), heads)).T)
            .view(1, positions, heads, head_dim)
            .transpose(1, 2)
        )

    doubled = torch.cat((angles, angles), -1)[None]
    q, k = apply_rotary_pos_emb(split(wq), split(wk), doubled.cos(), doubled.sin())
    expected = by_complex(wq) @ by_complex(wk).transpose(-1, -2)
    # sums of 8 products of numbers of size 5 in float32: 8 * 25 * 2**-24 is 1e-5
    torch.testing.assert_close((q @ k.transpose(-1, -2))[0], expected, atol=5e-5, rtol=1e-5)
    example = half_split_rows(np.arange(6)[:, None], 1)
    assert example[:, 0].tolist() == [0, 2, 4, 1, 3, 5]
