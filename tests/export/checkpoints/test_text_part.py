"""Text models out of checkpoints that also see images, under every name that their tensors have had."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.checkpoints.checkpoint import open_checkpoint
from runtime.errors import UserError
from tests.helpers import raw_mistral
from tests.helpers.families import FAMILIES

NOTE = "the image encoder and its projector are left out ({} tensors, 0 MB): the artifact reads text only"


@pytest.fixture(scope="module")
def with_images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images") / "checkpoint"
    FAMILIES["mistral-small-3"].write(folder)
    return folder


@pytest.fixture
def copy(with_images, tmp_path) -> Path:
    return Path(shutil.copytree(with_images, tmp_path / "copy"))


def renamed(folder: Path, old: str, new: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    changed = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}
    save_file(changed, folder / "model.safetensors", {"format": "pt"})


def edit(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def test_the_text_model_is_read_and_the_rest_is_named(with_images):
    ours = open_checkpoint(with_images, "auto", {})
    images = [n for n in load_file(with_images / "model.safetensors") if not n.startswith("language_model.")]
    assert ours.notes == (NOTE.format(len(images)),)
    assert ours.model.rope_theta == 1e9
    assert not ours.model.tied_embeddings


def test_names_of_transformers_5_hold_the_same_model(with_images, copy):
    for old, new in (
        ("language_model.model.", "model.language_model."),
        ("language_model.lm_head.", "lm_head."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ):
        renamed(copy, old, new)
    ours, expected = open_checkpoint(copy, "auto", {}), open_checkpoint(with_images, "auto", {})
    assert ours.names() == expected.names()
    assert all(np.array_equal(ours.tensor(name), expected.tensor(name)) for name in ours.names())
    assert ours.notes == expected.notes


def test_a_head_that_is_not_stored_is_tied_where_nothing_says_otherwise(copy):
    """As the class Mistral3Config has it."""
    tensors = load_file(copy / "model.safetensors")
    del tensors["language_model.lm_head.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    text = json.loads((copy / "config.json").read_text())["text_config"]
    text.pop("tie_word_embeddings", None)
    edit(copy, tie_word_embeddings=..., text_config=text)
    assert open_checkpoint(copy, "auto", {}).model.tied_embeddings


def test_pixtral_as_llava_leaves_out_what_is_default(with_images, copy):
    """Its text_config has no number of heads: that is the default of the class, 32."""
    text = json.loads((copy / "config.json").read_text())["text_config"]
    del text["num_attention_heads"]
    edit(copy, model_type="llava", architectures=["LlavaForConditionalGeneration"], text_config=text)
    with pytest.raises(UserError, match=r"q_proj.weight has shape \(32, 32\), expected \(256, 32\)"):
        open_checkpoint(copy, "auto", {})
    edit(copy, text_config={**text, "num_attention_heads": 4})
    assert open_checkpoint(copy, "auto", {}).model == open_checkpoint(with_images, "auto", {}).model


def test_llava_of_a_mistral(with_images, copy):
    """Llava 1.6 of Mistral-7B, which also holds the embedding of a line's end between images."""
    tensors = load_file(copy / "model.safetensors") | {"image_newline": torch.ones(32)}
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    edit(copy, model_type="llava_next", architectures=["LlavaNextForConditionalGeneration"])
    ours, expected = open_checkpoint(copy, "auto", {}), open_checkpoint(with_images, "auto", {})
    assert ours.model == expected.model
    assert len(ours.notes) == 1


def test_params_json_with_an_image_encoder(tmp_path):
    params = {**raw_mistral.PARAMS, "vision_encoder": {"hidden_size": 16}}
    tensors = raw_mistral.raw_tensors(params)
    images = {
        "vision_encoder.patch_conv.weight": torch.ones(2, 2),
        "vision_language_adapter.w_in.weight": torch.ones(2, 2),
    }
    raw_mistral.write_raw(tmp_path / "raw", params, {**tensors, **images})
    ours = open_checkpoint(tmp_path / "raw", "auto", {})
    assert ours.notes == (NOTE.format(2),)
    raw_mistral.write_raw(tmp_path / "text", raw_mistral.PARAMS, {**tensors, **images})
    with pytest.raises(UserError, match=r"holds the tensor vision_encoder.patch_conv.weight and 1 more, which has"):
        open_checkpoint(tmp_path / "text", "auto", {})


REFUSALS = {
    "has the model type mistral3 and no text_config, expected an object": {"text_config": ...},
    "names the architecture 'qwen2', expected one of mistral": {"text_config": {"model_type": "qwen2"}},
    "lacks hidden_size, which gives the model's dim": {"text_config": {"model_type": "mistral"}},
    "names the architectures ['VoxtralForConditionalGeneration']": {
        "architectures": ["VoxtralForConditionalGeneration"]
    },
}


@pytest.mark.parametrize("message", REFUSALS)
def test_what_does_not_describe_a_text_model_is_refused(copy, message):
    edit(copy, **REFUSALS[message])
    with pytest.raises(UserError) as caught:
        open_checkpoint(copy, "auto", {})
    assert message in str(caught.value)
