"""Torch and transformers beside our kernels: which Python is asked, for what, and what its script does."""

import json
import sys

import msgspec
import pytest
import torch

from runtime.artifact.folder import Artifact
from runtime.gpu_check import torch_process, transformers_script
from runtime.gpu_check.process_group import OutOfTimeError, UnfinishedError
from runtime.gpu_check.torch_process import (
    Product,
    TorchTimes,
    TransformersTimes,
    ask_torch,
    ask_transformers,
    is_comparable,
    pythons,
)
from tests.helpers.artifacts import WINDOW
from tests.helpers.shipped import executable

PRODUCT = Product("decode", 1, 4, 8, 2)


@pytest.fixture
def python(tmp_path, monkeypatch):
    """`python(body)` adds a stand-in for a Python of this machine, whose body is a shell script."""
    made = []
    monkeypatch.setattr(torch_process, "pythons", lambda: iter(made))

    def python(body):
        made.append(str(executable(tmp_path / f"python{len(made)}", body)))
        return made[-1]

    return python


def test_torch_of_another_python_is_asked(python, tmp_path):
    """The first that answers is believed; it is given the products."""
    python("echo no torch here >&2; exit 1")
    python(f'printf %s "$2" > {tmp_path}/asked; echo a warning; echo \'{{"peak_tflop_s": 5.0, "seconds": {{}}}}\'')
    python("exit 1")
    assert ask_torch([PRODUCT], 60) == TorchTimes(5.0, {})
    assert json.loads((tmp_path / "asked").read_text()) == [{"graph": "decode", "rows": 1, "n": 4, "k": 8, "calls": 2}]


def test_every_python_says_why_it_has_no_torch(python):
    first, second = python("echo no torch here >&2; exit 1"), python("echo ready")
    with pytest.raises(UnfinishedError) as raised:
        ask_torch([PRODUCT], 60)
    assert str(raised.value) == f"{first}: it ended with status 1: no torch here; {second}: it gave no answer"


def test_a_python_that_says_nothing_is_ended(python, monkeypatch):
    monkeypatch.setattr(torch_process, "LONGEST", 0.3)
    python("sleep 60")
    with pytest.raises(UnfinishedError, match=r"it said nothing for 0\.3 s"):
        ask_torch([PRODUCT], 60)


def test_no_python_is_asked_beyond_the_time(python):
    python("sleep 60")
    with pytest.raises(OutOfTimeError):
        ask_torch([PRODUCT], 0.3)


def test_every_python_of_the_path_is_known(tmp_path, monkeypatch):
    """A virtual environment that is active may hide the one that has torch."""
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
        executable(folder / "python3", "")
    monkeypatch.setenv("PATH", f"{folders[0]}:{folders[1]}:{folders[0]}:{tmp_path}/absent")
    monkeypatch.setattr(torch_process, "FOLDERS", ())
    assert list(pythons()) == [sys.executable, *(str(folder / "python3") for folder in folders)]


def test_torch_without_a_gpu_is_no_torch(monkeypatch):
    """The script itself runs on this machine, up to its query for a GPU."""
    monkeypatch.setattr(torch_process, "pythons", lambda: [sys.executable])
    if not torch.cuda.is_available():
        with pytest.raises(UnfinishedError, match="torch sees no GPU"):
            ask_torch([], 60)


def test_transformers_is_asked_for_a_model_of_the_same_sizes(compile_case, python, tmp_path):
    model = Artifact.open(compile_case("windowed").artifact).manifest.model
    python(
        f'printf %s "$2" > {tmp_path}/asked; echo \'{{"ttft": {{"8": 0.5}}, "decode": {{"4": 0.25}}, "graph": true}}\''
    )
    assert ask_transformers(model, [8], [4], 60) == TransformersTimes({8: 0.5}, {4: 0.25}, graph=True)
    asked = json.loads((tmp_path / "asked").read_text())
    assert (asked["prompts"], asked["contexts"]) == ([8], [4])
    assert (asked["config"]["hidden_size"], asked["config"]["sliding_window"]) == (model.dim, WINDOW)


def test_a_mixture_and_different_windows_are_not_asked_for(compile_case):
    model = Artifact.open(compile_case("windowed").artifact).manifest.model
    assert is_comparable(model)
    for other in ({"n_experts": 4, "experts_per_token": 2}, {"sliding_window": (8, None)}):
        assert not is_comparable(msgspec.structs.replace(model, **other))


def small_transformers(window):
    """A transformers model with one layer, on the CPU."""
    config = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 50,
        "sliding_window": window,
    }
    return transformers_script.random_model(config, "cpu", torch.float32)


def test_every_replay_of_a_step_has_room_in_the_cache(monkeypatch):
    """The cache counts its tokens where it lies, so each replay of a graph writes a new column, as a call does."""
    monkeypatch.setattr(transformers_script, "recorded", lambda step: step)
    with torch.inference_mode():
        assert transformers_script.step_seconds(small_transformers(None), 4)[1]


def test_the_script_times_a_model_of_transformers():
    """It runs on this machine's CPU, and so without a graph."""
    found = transformers_script.measured(small_transformers(8), [4, 20], [4, 20])
    assert (found["ttft"].keys(), found["decode"].keys()) == ({4, 20}, {4, 20})
    assert all(seconds > 0 for part in ("ttft", "decode") for seconds in found[part].values())
    assert found["graph"] == torch.cuda.is_available()
    assert torch.get_default_dtype() == torch.float32
