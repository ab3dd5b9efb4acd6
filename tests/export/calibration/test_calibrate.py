"""Models that are rounded layer by layer: the divergence of each method, going on after a kill, and special layers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from export.calibration import calibrate as module
from export.calibration.calibrate import calibrated
from export.calibration.methods import searched
from export.calibration.results import LayerResults
from export.checkpoints.checkpoint import open_checkpoint
from export.proof.steppers import checkpoint_weights, static_model
from export.weights.storing import record_of
from export.weights.table import load, specs, store
from export.workspace import growing_stage
from runtime.artifact.manifest import Quantization
from runtime.errors import UserError
from tests.helpers.families import FAMILIES
from tests.helpers.tiny import write_tiny_mistral

LENGTH = 128


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny Mistral whose inputs are uneven, as those of trained models are: a few columns of its norms are large."""
    folder = tmp_path_factory.mktemp("calibrate") / "tiny"
    write_tiny_mistral(folder, sliding_window=None)
    weights = torch_weights(folder)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in weights.items():
        if name.endswith("layernorm.weight"):
            tensor *= torch.exp(torch.randn(tensor.shape, generator=generator))
    save(folder, weights)
    return folder


def torch_weights(folder):
    return load_file(folder / "model.safetensors")


def save(folder, weights):
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def ids_of(checkpoint, rows=4, seed=0):
    return np.random.default_rng(seed).integers(0, checkpoint.model.vocab_size, (rows, LENGTH))


def record_for(checkpoint, method, scheme="int4", **changes):
    return record_of(checkpoint, Quantization(scheme=scheme, method=method, **changes), "fp32", {})


def rounded_weights(checkpoint, record, files):
    """All weights in float32, those in the files as they were rounded."""
    places = {name: file for file in files for name in file.tensors}
    return checkpoint_weights(checkpoint) | {
        tensor.name: load(tensor, {spec.name: places[spec.name].read(spec.name) for spec in specs(tensor)})
        for tensor in record.tensors
        if tensor.name in places
    }


def log_probabilities(checkpoint, weights, ids):
    model = static_model(checkpoint.model, LENGTH, weights)
    config = checkpoint.model
    caches = [
        torch.zeros((len(ids), config.n_kv_heads, slots, config.head_dim))
        for slots in model.cache_lens
        for _ in range(2)
    ]
    model.finish = lambda x: model.output(model.norm(x))  # of every token, where the model itself has the last one's
    with torch.no_grad():
        logits, *_ = model(torch.from_numpy(ids), torch.arange(LENGTH).repeat(len(ids), 1), *caches)
    return logits.double().log_softmax(-1)


def calibrate(checkpoint, record, folder: Path):
    return calibrated(checkpoint, record, ids_of(checkpoint), LayerResults(growing_stage(folder, "layers", "0" * 20)))


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_method_diverges_less_than_the_one_before(tiny, tmp_path, symmetric):
    """On tokens that calibration has not seen.

    The mean follows a few tokens at which random weights are all but undecided, so the median is compared too.
    """
    checkpoint = open_checkpoint(tiny, "auto", {})
    unseen = ids_of(checkpoint, seed=1)
    exact = log_probabilities(checkpoint, checkpoint_weights(checkpoint), unseen)
    divergence = {}
    for method in ("search", "weighted_search", "gptq"):
        record = record_for(checkpoint, method, symmetric=symmetric)
        if method == "search":
            weights = checkpoint_weights(checkpoint) | {t.name: nearest(t, checkpoint) for t in searched(record)}
        else:
            weights = rounded_weights(checkpoint, record, calibrate(checkpoint, record, tmp_path / method)[0])
        found = log_probabilities(checkpoint, weights, unseen)
        divergence[method] = (exact.exp() * (exact - found)).sum(-1)
    search, weighted, gptq = divergence.values()
    assert gptq.mean() < weighted.mean() < search.mean()
    assert weighted.median() < 0.75 * search.median()
    assert gptq.median() < 0.6 * weighted.median()


def nearest(tensor, checkpoint):
    """A tensor as its format rounds it, without importance."""
    return load(tensor, store(tensor, checkpoint.tensor(tensor.name).astype(np.float32)))


@pytest.mark.parametrize("method", ["weighted_search", "gptq"])
def test_a_run_that_is_killed_goes_on_where_it_was(tiny, tmp_path, monkeypatch, method):
    """Finished layers are not rounded again, and the result is the same."""
    checkpoint = open_checkpoint(tiny, "auto", {})
    record = record_for(checkpoint, method, keep=("head",), keep_scheme="int4")
    whole, errors = calibrate(checkpoint, record, tmp_path / "whole")
    kept, rounded = module.rounded, []

    def killed(tensor, *rest):
        if tensor.name == "layers.1.feed_forward.w13.weight":
            raise KeyboardInterrupt
        return kept(tensor, *rest)

    monkeypatch.setattr(module, "rounded", killed)
    with pytest.raises(KeyboardInterrupt):
        calibrate(checkpoint, record, tmp_path / "killed")
    monkeypatch.setattr(module, "rounded", lambda tensor, *rest: (rounded.append(tensor.name), kept(tensor, *rest))[1])
    files, again = calibrate(checkpoint, record, tmp_path / "killed")
    assert {name.split(".")[1] for name in rounded if name.startswith("layers")} == {"1"}
    assert "output.weight" in rounded
    assert again == errors
    for one, other in zip(whole, files, strict=True):
        assert one.path.read_bytes() == other.path.read_bytes()
    rounded.clear()
    calibrate(checkpoint, record, tmp_path / "killed")
    assert rounded == []


def test_a_damaged_layer_is_made_again(tiny, tmp_path):
    checkpoint = open_checkpoint(tiny, "auto", {})
    record = record_for(checkpoint, "weighted_search")
    files, _ = calibrate(checkpoint, record, tmp_path)
    before = files[0].path.read_bytes()
    files[0].path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    calibrate(checkpoint, record, tmp_path)
    assert files[0].path.read_bytes() == before


@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        ({}, {"layers.0.", "layers.1."}),
        ({"keep": ("first",)}, {"layers.1."}),
        ({"keep": ("last",)}, {"layers.0."}),
        ({"scheme": "int8", "keep": ("head",), "keep_scheme": "int4"}, {"output.we"}),
    ],
)
def test_only_what_is_stored_in_4_bits_is_rounded(tiny, tmp_path, quantization, expected):
    checkpoint = open_checkpoint(tiny, "auto", {})
    record = record_for(checkpoint, "weighted_search", **quantization)
    files, errors = calibrate(checkpoint, record, tmp_path)
    assert {error.tensor[:9] for error in errors} == expected
    stored = {spec.name for t in searched(record) for spec in specs(t)}
    assert {name for file in files for name in file.tensors} == stored


@pytest.mark.parametrize("family", ["mixtral", "ministral-3", "ministral", "mistral-v0.1"])
@pytest.mark.parametrize("method", ["weighted_search", "gptq"])
def test_models_of_the_family(tmp_path, family, method):
    """Their layers are those of `test_layers`; the experts of a mixture stay int8, and a head may be the embeddings."""
    FAMILIES[family].write(tmp_path / "checkpoint")
    checkpoint = open_checkpoint(tmp_path / "checkpoint", "auto", {})
    record = record_for(checkpoint, method, "int4_dynamic", keep=("head",), keep_scheme="int4_dynamic")
    _, errors = calibrate(checkpoint, record, tmp_path / "work")
    assert {error.tensor for error in errors} == {t.name for t in searched(record)}
    assert not any(".experts." in error.tensor for error in errors)
    assert all(0 < error.error < 0.15 for error in errors)  # 4 bits, of which the search leaves about 8 percent


def test_a_number_that_is_too_large_is_refused_with_its_place(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "large")
    weights = torch_weights(folder)
    weights["model.layers.0.self_attn.o_proj.weight"][3] = 1e7
    save(folder, weights)
    checkpoint = open_checkpoint(folder, "auto", {})
    for method in ("weighted_search", "gptq"):
        with pytest.raises(UserError, match=r"layers\.0\.attention\.wo\.weight, row 3: a number is too large to store"):
            calibrate(checkpoint, record_for(checkpoint, method), tmp_path / method)


def test_a_model_that_computes_infinite_numbers_is_refused(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "infinite")
    weights = torch_weights(folder)
    weights["model.layers.0.post_attention_layernorm.weight"] *= 1e30
    save(folder, weights)
    checkpoint = open_checkpoint(folder, "auto", {})
    for method in ("weighted_search", "gptq"):
        with pytest.raises(UserError, match="numbers that are not finite on the calibration text; fetch"):
            calibrate(checkpoint, record_for(checkpoint, method), tmp_path / method)
