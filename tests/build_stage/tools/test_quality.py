"""Quality figures against their definitions, and the command's refusals.

The acceptance test runs the measurement on a real model.
"""

import contextlib
import math
import subprocess
import sys

import numpy as np
import pytest

from build.tools import quality as module
from build.tools.quality import LENGTH, OVER_BUDGET, OWN, ROWS, Sums, check_budget, layer_errors, log_softmax, text
from build.tools.quality_report import Quality, draw_errors, draw_quality, table
from build.tools.variants import BASELINE, VARIANTS
from export.stage import ROOT
from export.weights.stored import StoredWeights
from runtime.artifact.schemes import SCHEMES
from runtime.errors import UserError

RESULTS = [
    Quality(BASELINE, 100, 20.0, 0.0, 1.0, 4_000_000),
    Quality(f"int8 ({OWN})", 100, 20.1, 0.01, 0.97, 1_000_000),
]


def test_the_text_is_english_and_long_enough():
    found = text()
    assert found.startswith("DEFIN. I.")
    assert "Rays of Light" in found
    assert len(found) > 4 * ROWS * LENGTH  # a token is about four letters


def test_another_text_is_refused(monkeypatch):
    monkeypatch.setattr(module, "TEXT_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"Opticks\.txt is not the text that quality is measured on"):
        text()


def test_log_softmax_is_normalised():
    scores = log_softmax(np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32) * 100)
    assert np.allclose(np.exp(scores).sum(-1), 1, rtol=1e-12)


def test_figures_follow_their_definitions():
    """Two positions of three tokens, worked out by hand."""
    baseline, variant = np.log([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]), np.log([[0.4, 0.5, 0.1], [0.2, 0.6, 0.2]])
    sums = Sums()
    sums.add(variant, baseline, np.array([0, 2]))
    found = sums.quality("x", 7)
    assert found.perplexity == pytest.approx(1 / math.sqrt(0.4 * 0.2))
    first = 0.5 * math.log(0.5 / 0.4) + 0.25 * math.log(0.25 / 0.5) + 0.25 * math.log(0.25 / 0.1)
    second = 0.1 * math.log(0.1 / 0.2) * 2 + 0.8 * math.log(0.8 / 0.6)
    assert found.divergence == pytest.approx((first + second) / 2)
    assert (found.agreement, found.tokens, found.weight_bytes) == (0.5, 2, 7)


@pytest.mark.parametrize(("budget", "status"), [(None, 0), (0.6, 0), (0.4, OVER_BUDGET)])
def test_budget_is_of_the_configs_own_scheme(budget, status, capsys):
    """20.1 is half a percent more than 20."""
    assert check_budget(RESULTS, budget) == status
    assert ("+0.500 %" in capsys.readouterr().out) == (budget is not None)


def test_table_compares_with_the_first():
    columns = {column.header: list(column.cells) for column in table(RESULTS).columns}
    assert columns["change"] == ["", "+0.50%"]
    assert columns["KL divergence"] == ["", "0.01000"]
    assert columns["size"] == ["4.0 MB", "1.0 MB"]


def test_every_scheme_is_a_variant():
    named = {
        setting.removeprefix("quantize.scheme=")
        for sets in VARIANTS.values()
        for setting in sets
        if setting.startswith("quantize.scheme=")
    }
    assert named == set(SCHEMES)


def test_plots_are_drawn(tmp_path):
    draw_quality(RESULTS, tmp_path / "a.svg")
    draw_errors({"int4": {"wqkv": [0.1, 0.2], "output": [0.05]}}, tmp_path / "b.svg")
    assert "this config" in (tmp_path / "a.svg").read_text()
    assert "wqkv" in (tmp_path / "b.svg").read_text()


def test_layer_errors_are_those_of_the_stored_numbers(compile_case):
    """int8 rounds to within half a 127th of a row's largest number: below 2 percent of a matrix's size.

    int4 is tens of times coarser.
    """
    case = compile_case("int4")
    with contextlib.chdir(case.folder):  # the folder to which the checkpoint's path is relative
        errors = layer_errors(case.checkpoint, StoredWeights.open(case.graphs.folder))
    assert {kind: len(values) for kind, values in errors.items()} == {
        "tok_embeddings": 1,
        "wqkv": 2,
        "wo": 2,
        "w13": 2,
        "w2": 2,
    }
    assert 0 < errors["tok_embeddings"][0] < 0.02
    assert all(0.03 < value < 0.15 for kind, values in errors.items() if kind != "tok_embeddings" for value in values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "fp32,int3"], "--variants names int3, expected some of fp32, bf16"),
        (
            ["--set", "backend.target=cuda"],
            "backend.target is cuda, expected a target that runs here; add --set backend.target=llvm",
        ),
    ],
)
def test_wrong_use_is_one_sentence(arguments, message):
    command = [sys.executable, "-m", "build.tools.quality", "yaml/tiny.yaml", *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
