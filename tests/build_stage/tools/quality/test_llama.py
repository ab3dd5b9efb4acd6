"""llama.cpp beside our variants: when it takes part, and that it reads what it is sent."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from build.tools.llama_files import AS_IT_IS
from build.tools.quality import llama
from build.tools.quality.llama import KINDS, LlamaProcess, llama_contestants, reason_to_leave_out
from export.checkpoints.checkpoint import open_checkpoint
from export.configuration.config import load_config
from runtime.errors import UserError
from tests.helpers import reference
from tests.helpers.gguf_files import write_gguf
from tests.helpers.tiny import write_tiny_mistral

installed = pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="needs `make setup BENCH=1`")


def config(folder, checkpoint, frontend=""):
    path = folder / "x.yaml"
    path.write_text(f"name: x\nfrontend: {{checkpoint: {checkpoint}{frontend}}}\nbackend: {{target: llvm}}\n")
    return load_config(path)


@pytest.mark.parametrize(
    ("checkpoint", "frontend", "reason"),
    [
        ("folder", "", "it reads only GGUF checkpoints"),
        ("x.gguf", ", overrides: {sliding_window: 5}", "it does not support frontend.overrides"),
        ("x.gguf", ", adapter: lora", "it does not support frontend.adapter"),
    ],
)
def test_llama_cannot_read_everything(tmp_path, checkpoint, frontend, reason):
    assert reason_to_leave_out(config(tmp_path, checkpoint, frontend)) == reason


def test_llama_is_left_out_where_it_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(llama.importlib.util, "find_spec", lambda name: None)
    with llama_contestants(config(tmp_path, "x.gguf"), 16, 320) as contestants:
        assert contestants == {}
    assert "llama.cpp is left out: it needs `make setup BENCH=1`" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    write_tiny_mistral(folder / "huggingface", intermediate_size=128, sliding_window=None)
    write_gguf(folder / "x.gguf", folder / "huggingface", GGMLQuantizationType.F32, for_llama_cpp=True)
    write_gguf(folder / "ours.gguf", folder / "huggingface", GGMLQuantizationType.F32)
    return folder / "x.gguf"


@installed
def test_llama_reads_eight_texts_side_by_side(tiny_gguf):
    """Each text gives what numpy computes, whether its ids come at once or one by one.

    llama.cpp keeps keys and values in float16: each is off by up to 2^-11, so logits are by a few times as much.
    """
    checkpoint = open_checkpoint(tiny_gguf.with_name("ours.gguf"), "gguf", {})
    weights = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    ids = np.random.default_rng(0).integers(5, 260, size=(8, 20))
    expected = np.stack([reference.logits(checkpoint.model, weights, row.tolist()) for row in ids])
    process = LlamaProcess(config(tiny_gguf.parent, tiny_gguf), AS_IT_IS, 32)
    try:
        assert process.opened.weight_bytes == tiny_gguf.stat().st_size
        found = process.prefill(ids[:, :15].tolist())
        scale = np.abs(expected).max()
        assert np.abs(found - expected[:, 14]).max() / scale < 2**-8
        for place in range(15, 20):
            found = process.prefill(ids[:, place : place + 1].tolist())
            assert np.abs(found - expected[:, place]).max() / scale < 2**-8
        process.reset()
        again = process.prefill(ids[:, :1].tolist())
        assert np.abs(again - expected[:, 0]).max() / scale < 2**-8
    finally:
        process.close()


@installed
def test_another_vocabulary_is_refused(tiny_gguf):
    settings = config(tiny_gguf.parent, tiny_gguf)
    with (
        pytest.raises(UserError, match=r"llama\.cpp reads 320 tokens from the vocabulary of .*, expected 321"),
        llama_contestants(settings, 16, 321),
    ):
        pass


@installed
def test_a_file_that_llama_refuses_is_one_sentence(tmp_path, capfd):
    (tmp_path / "x.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(UserError, match=r"llama\.cpp ended with status 2 on the file; its own message is above"):
        LlamaProcess(config(tmp_path, tmp_path / "x.gguf"), AS_IT_IS, 16)
    said = capfd.readouterr().err
    assert "llama.cpp cannot load" in said
    assert "failed to load model" in said  # and what it says itself


def test_the_kinds_are_types_that_llama_requantizes_to():
    """`build.tools.llama_engine` has a row for each, and can be imported only where llama.cpp is installed."""
    source = (Path(llama.__file__).parents[1] / "llama_engine.py").read_text()
    assert all(f'"{kind}": llama_cpp.' in source for kind in KINDS if kind != AS_IT_IS)
