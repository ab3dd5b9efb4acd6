"""Layers run one by one, against `transformers`: their outputs, and what their matrices are multiplied with."""

import numpy as np
import pytest
import torch

from export.calibration.layers import Layers
from export.calibration.moments import Moments
from export.checkpoints.checkpoint import open_checkpoint
from export.proof.reference_model import load_reference, reference_logits
from runtime.artifact.bounds import relative_bound
from tests.helpers.families import FAMILIES

LENGTH = 20  # more than the windows
# a window; full and windowed layers; a mixture; YaRN, scaled queries and a tied head; rows in Mistral's own order
CASES = ("mistral-v0.1", "ministral", "mixtral", "ministral-3", "raw")


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A checkpoint, ids, the reference model, and the layers run with the inputs of every matrix kept."""
    folder = tmp_path_factory.mktemp(request.param) / "checkpoint"
    FAMILIES[request.param].write(folder)
    checkpoint = open_checkpoint(folder, "auto", {})
    ids = np.random.default_rng(0).integers(0, checkpoint.model.vocab_size, (2, LENGTH))
    layers = Layers(checkpoint, ids, {})
    states, inputs = layers.embedded(), {}
    for layer in range(checkpoint.model.n_layers):
        states = layers.run(
            layer, layers.weights(layer), states, lambda name, x: inputs.setdefault(name, []).append(x.numpy().copy())
        )
    return checkpoint, ids, load_reference(folder, "auto", checkpoint.model), layers, states, inputs


def close(found, expected, checkpoint):
    bound = relative_bound(checkpoint.model, LENGTH, "fp32")
    assert np.abs(found - expected).max() <= bound * np.abs(expected).max()


def test_the_outputs_are_those_of_transformers(case):
    checkpoint, ids, reference, layers, states, _ = case
    name = "tok_embeddings.weight" if checkpoint.model.tied_embeddings else "output.weight"
    logits = layers.head_inputs(name, states).numpy() @ checkpoint.tensor(name).astype(np.float32).T
    close(logits.reshape(2, LENGTH, -1), reference_logits(reference, ids, checkpoint.model.head), checkpoint)


def test_the_inputs_are_those_of_transformers(case):
    """Of the first and the last matrix of a layer; those of experts are not seen, since nothing rounds them."""
    checkpoint, ids, reference, _, _, inputs = case
    theirs = {}
    last = reference.base_model.layers[-1]
    names = {"attention.wqkv": last.self_attn.q_proj, "attention.wo": last.self_attn.o_proj}
    if checkpoint.model.n_experts is None:
        names["feed_forward.w2"] = last.mlp.down_proj
    for name, module in names.items():
        module.register_forward_pre_hook(lambda _, given, name=name: theirs.setdefault(name, given[0]))
    with torch.no_grad():
        reference(torch.from_numpy(ids), use_cache=False)
    for name in names:
        found = np.stack(inputs[f"layers.{checkpoint.model.n_layers - 1}.{name}.weight"])
        close(found, theirs[name].numpy(), checkpoint)


def test_moments_are_means_over_all_tokens():
    generator = np.random.default_rng(0)
    rows = [generator.standard_normal((5, 8)).astype(np.float32) for _ in range(3)]
    whole, diagonal = Moments(whole=True), Moments(whole=False)
    for moments in (whole, diagonal):
        for row in rows:
            moments.add(torch.from_numpy(row))
    inputs = np.concatenate(rows).astype(np.float64)
    expected = inputs.T @ inputs / len(inputs)
    np.testing.assert_allclose(whole.importance(), np.diag(expected), rtol=1e-6)
    np.testing.assert_allclose(diagonal.importance(), np.diag(expected), rtol=1e-6)
    np.testing.assert_allclose(whole.take_second_moment().numpy(), expected, atol=1e-6)
    matrix = generator.standard_normal((4, 8)).astype(np.float32)
    np.testing.assert_allclose(whole.outputs(matrix).numpy(), rows[0] @ matrix.T, rtol=1e-5, atol=1e-6)
