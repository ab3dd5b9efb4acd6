"""Paths that hold no checkpoint, or only part of one: one sentence that says what to do instead."""

import json
import shutil
from pathlib import Path

import pytest
from mistral_common import __file__ as mistral_common_file

from export.checkpoints.checkpoint import open_checkpoint
from export.checkpoints.location import detect
from runtime.errors import UserError
from tests.helpers.raw_mistral import PARAMS, raw_tensors, write_raw
from tests.helpers.tiny import write_tiny_mistral

SENTENCEPIECE = Path(mistral_common_file).parent / "data" / "tokenizer.model.v1"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"ab" * 32 + b"\nsize 14483464192\n"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("location") / "tiny"
    write_tiny_mistral(folder)
    return folder


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def refused(path: Path, kind: str = "auto") -> str:
    with pytest.raises(UserError) as caught:
        open_checkpoint(path, kind, {})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
)
def test_lfs_pointers(copy, name):
    (copy / name).write_bytes(POINTER)
    assert refused(copy) == (
        f"{copy / name} is a Git LFS pointer of 136 bytes, not the file itself; "
        f"run `git lfs pull` in {copy}, or fetch the file again"
    )


def test_lfs_pointers_of_other_forms(copy, tmp_path):
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.model").write_bytes(POINTER)
    assert "tokenizer.model is a Git LFS pointer" in refused(copy)
    shutil.copy(SENTENCEPIECE, copy / "tokenizer.model")
    (copy / "model.safetensors").rename(tmp_path / "whole.safetensors")
    (copy / "pytorch_model.bin").write_bytes(POINTER)
    assert "pytorch_model.bin is a Git LFS pointer" in refused(copy)
    (copy / "model-00001-of-00001.safetensors").write_bytes(POINTER)
    (copy / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00001.safetensors"}}')
    assert "model-00001-of-00001.safetensors is a Git LFS pointer" in refused(copy)
    (copy / "model.safetensors.index.json").write_bytes(POINTER)
    assert "model.safetensors.index.json is a Git LFS pointer" in refused(copy)


@pytest.mark.parametrize("name", ["params.json", "tekken.json", "consolidated.safetensors", "consolidated.00.pth"])
def test_lfs_pointers_of_mistrals_own_format(tmp_path, name):
    write_raw(tmp_path, PARAMS, raw_tensors(PARAMS))
    if name.endswith("pth"):
        (tmp_path / "consolidated.safetensors").unlink()
    (tmp_path / name).write_bytes(POINTER)
    assert f"{name} is a Git LFS pointer" in refused(tmp_path)


def test_lfs_pointer_of_a_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(POINTER)
    assert "model.gguf is a Git LFS pointer" in refused(tmp_path)
    assert "model.gguf is a Git LFS pointer" in refused(tmp_path / "model.gguf")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.safetensors", "model.gguf", "mistral.png"])
def test_pointers_that_no_reader_needs(copy, name):
    """People fetch only what they need: `git lfs pull --include model.safetensors`."""
    (copy / name).write_bytes(POINTER)
    assert open_checkpoint(copy, "auto", {}).model.dim == 64


@pytest.fixture
def adapter(tmp_path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "mistralai/Mistral-7B-v0.1"}))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def test_an_adapter_alone(adapter, copy):
    advice = "with mistralai/Mistral-7B-v0.1, and frontend.adapter to "
    assert refused(adapter).endswith(advice + str(adapter))
    shutil.copy(copy / "config.json", adapter)  # as training scripts leave it
    assert advice in refused(adapter)
    (adapter / "adapter_config.json").write_text("{}")
    assert "with its base model, and" in refused(adapter)


def test_an_adapter_beside_the_model_is_not_merged_in_silence(adapter, copy):
    shutil.copy(adapter / "adapter_config.json", copy)
    assert open_checkpoint(copy, "auto", {}).notes == (
        f"{copy} holds an adapter beside the model, which is merged only if frontend.adapter names it",
    )


def test_an_adapter_of_mistral_finetune_alone(tmp_path):
    write_raw(tmp_path, PARAMS, {})
    (tmp_path / "consolidated.safetensors").rename(tmp_path / "lora.safetensors")
    assert "holds an adapter, which changes the weights of another model" in refused(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "model.safetensors.index.json"])
def test_one_file_of_a_folder(copy, name, tmp_path):
    (copy / "model.safetensors.index.json").touch()
    assert refused(copy / name).endswith(f"is one file of a checkpoint; set frontend.checkpoint to its folder, {copy}")
    alone = tmp_path / "alone"
    alone.mkdir()
    shutil.copy(copy / "model.safetensors", alone / "mistral-7b.safetensors")
    assert f"{alone} has neither config.json nor params.json" in refused(alone / "mistral-7b.safetensors")


def test_the_folder_around_a_checkpoint(copy, tmp_path):
    cache = tmp_path / "models--mistralai--Mistral-7B-v0.1"
    revision = Path(shutil.copytree(copy, cache / "snapshots" / "26bca36"))
    (cache / "refs").mkdir()
    assert refused(cache) == f"{cache} is the folder around a checkpoint; set frontend.checkpoint to {revision}"
    assert f"set frontend.checkpoint to {revision}" in refused(cache / "snapshots")
    other = Path(shutil.copytree(copy, cache / "snapshots" / "3ec4c3c"))
    assert f"several checkpoints, {revision} and {other}; set" in refused(cache)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.onnx", "an ONNX model"),
        ("tf_model.h5", "weights of TensorFlow"),
        ("flax_model.msgpack", "weights of Flax"),
        ("mistral.nemo", "a model of NeMo"),
        ("zero_to_fp32.py", "a training state of DeepSpeed"),
        ("qmodel.pt", "a model quantized by HQQ"),
        ("mistral-7B-v0.1.tar", "an archive; unpack it"),
        ("model.gguf.part1of2", "a piece of a GGUF; join the pieces"),
        ("model.safetensors.incomplete", "what is left of a file that was not fetched to its end"),
    ],
)
def test_other_formats(tmp_path, tiny, name, words):
    (tmp_path / name).touch()
    assert f"{tmp_path} holds {name}, {words}" in refused(tmp_path)
    shutil.copy(tiny / "config.json", tmp_path)
    assert f"{tmp_path} holds {name}, {words}" in refused(tmp_path)


def test_a_download_that_was_stopped(copy):
    unfinished = copy / ".cache" / "huggingface" / "download" / "abc.incomplete"
    unfinished.parent.mkdir(parents=True)
    (copy / "model.safetensors").rename(unfinished)
    assert "abc.incomplete, what is left of a file that was not fetched to its end" in refused(copy)
    assert "is what is left of a file that was not fetched to its end" in refused(unfinished)


def test_a_gguf_is_told_by_its_contents(tmp_path):
    """As in a folder of blobs, whose names are sums."""
    (tmp_path / "sha256-abc").write_bytes(b"GGUF")
    assert refused(tmp_path).endswith(f"by its contents; set frontend.checkpoint to {tmp_path / 'sha256-abc'}")
    (tmp_path / "sha256-abc").rename(tmp_path / "model.bin")
    assert refused(tmp_path).endswith(f"by its contents; set frontend.checkpoint to {tmp_path / 'model.bin'}")
    assert "is not a complete GGUF file" in refused(tmp_path / "model.bin")  # it is read as one


def test_formats_without_a_model_type(tmp_path):
    (tmp_path / "config.json").write_text('{"bos_token": "<s>"}')
    (tmp_path / "model.bin").write_bytes(b"\6\0\0\0")
    assert "holds model.bin, weights of CTranslate2" in refused(tmp_path)
    (tmp_path / "model.bin").write_bytes(b"tjgg\3\0\0\0")
    (tmp_path / "model.bin").rename(tmp_path / "ggml-model-q4_0.bin")
    assert "is a GGML file, which came before GGUF" in refused(tmp_path / "ggml-model-q4_0.bin")


def test_weights_without_a_config(copy):
    (copy / "config.json").unlink()
    assert "holds model.safetensors and neither config.json nor params.json" in refused(copy)


def test_the_folders_that_the_hub_keeps(copy, tmp_path):
    revision = tmp_path / "home" / "hub" / "models--a--b" / "snapshots" / "26bca36"
    shutil.copytree(copy, revision)
    assert f"set frontend.checkpoint to {revision}" in refused(tmp_path / "home")
    assert f"set frontend.checkpoint to {revision}" in refused(tmp_path / "home" / "hub")


@pytest.mark.parametrize("name", ["mistralai/Mistral-7B-v0.1", "https://huggingface.co/mistralai/Mistral-7B-v0.1"])
def test_a_name_on_the_hub_is_no_path(name):
    assert "if it is a model on the Hugging Face Hub, fetch it first" in refused(Path(name))


def test_a_folder_without_weights(copy):
    (copy / "model.safetensors").unlink()
    assert "has neither model.safetensors, model.safetensors.index.json, pytorch_model.bin nor" in refused(copy)


def test_a_published_folder_of_which_only_mistrals_own_files_were_fetched(tmp_path):
    write_raw(tmp_path, PARAMS, raw_tensors(PARAMS))
    (tmp_path / "config.json").write_text('{"model_type": "mistral3"}')
    assert open_checkpoint(tmp_path, "auto", {}).model.dim == PARAMS["dim"]


def test_a_gguf_beside_a_config(tmp_path, tiny):
    """As in the repositories of those who quantize."""
    shutil.copy(tiny / "config.json", tmp_path)
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "ggml-model.bin").write_bytes(b"GGUF")
    assert detect(tmp_path / "ggml-model.bin") == "gguf"
    (tmp_path / "ggml-model.bin").unlink()
    assert detect(tmp_path) == "gguf"
    shutil.copy(tiny / "model.safetensors", tmp_path)
    assert detect(tmp_path) == "huggingface"


def test_what_is_wrong_with_weights_that_are_not_read_is_no_matter(copy):
    for name in ("consolidated.safetensors", "consolidated.00.pth", "consolidated-00001-of-00002.safetensors"):
        (copy / name).touch()
    assert open_checkpoint(copy, "auto", {}).model.dim == 64
    (copy / "model-00001-of-00002.safetensors").touch()
    assert open_checkpoint(copy, "auto", {}).model.dim == 64
