"""The real model in int8 costs under 1 % of perplexity, and writes the same text where it is shipped."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from build.tools.quality.figures import Distribution
from build.tools.quality.measuring import Contestant, measure
from build.tools.quality.texts import whole_rows
from export.calibration.fixed_text import OPTICKS
from export.proof.reference_model import reference_logits
from export.stage import ROOT
from runtime.artifact.consistency import WEIGHTS_FILE
from runtime.artifact.folder import Artifact
from runtime.engines.engine import Engine
from runtime.engines.side_by_side import SideBySide
from runtime.text.tokenizer import open_tokenizer
from tests.helpers.shipped import OWN_LIMIT, PYTHON, box_environment, install, own_bytes, unpack
from tests.helpers.smollm2 import CACHE_LEN, smollm2, transformers_model

pytestmark = pytest.mark.slow

HOST = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
PROMPT = "The capital of France is"
SHORT = 128  # tokens that both artifacts read in step


@pytest.fixture(scope="module")
def folder(shared_folder):
    return shared_folder / "smollm2"


@pytest.fixture(scope="module")
def int8(folder):
    return smollm2("int8", folder)


def test_the_shipped_model_writes_the_same_text_in_an_empty_environment(int8, folder, tmp_path):
    """No network, torch, onnx or compiler is there; and the golden prompts, computed by torch here, hold there."""
    subprocess.run(
        [sys.executable, "-m", "build.shipping.ship", "int8.yaml", "--pythons", PYTHON],
        cwd=folder,
        env=HOST,
        check=True,
    )
    box = unpack(folder / "out" / "int8.tar.zst", tmp_path)
    assert install(box).returncode == 0
    arguments = ["--prompt", PROMPT, "--max-tokens", "24", "--json"]

    def run(python: Path | str, artifact: Path, *command: str) -> dict[str, object]:
        result = subprocess.run(
            [python, "-m", command[0], artifact, *command[1:]],
            cwd=box,
            env=box_environment(),
            check=False,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout + result.stderr
        return json.loads(result.stdout)

    there = run(box / ".venv/bin/python", box / "artifact", "runtime.generate", *arguments)
    here = run(sys.executable, int8, "runtime.generate", *arguments)
    assert there["token_ids"] == here["token_ids"]
    assert "Paris" in there["text"]
    checks = run(box / ".venv/bin/python", box / "artifact", "runtime.verify", "--json")["checks"]
    assert sum("golden prompt" in check["check"] for check in checks) == 2
    assert own_bytes(box) <= OWN_LIMIT


@pytest.fixture(scope="module")
def expected(int8, folder):
    """Log-probabilities of the text's tokens by `transformers` with its float32 weights, in one pass."""
    ids = passages(int8).ids
    assert ids.shape == (1, CACHE_LEN + 1)
    logits = reference_logits(transformers_model("fp32", folder), ids[:, :-1], "causal_lm")[0]
    return Distribution.of(logits).log_of(ids[0, 1:])


def passages(artifact, length=CACHE_LEN):
    manifest = Artifact.open(artifact).manifest
    return whole_rows(OPTICKS.open(), open_tokenizer(manifest.tokenizer, artifact), 1, length)


def measured(folders, length=CACHE_LEN):
    contestants = {
        label: Contestant(SideBySide(Engine.open(folder), 1), (folder / WEIGHTS_FILE).stat().st_size)
        for label, folder in folders.items()
    }
    return measure(contestants, OPTICKS.name, passages(next(iter(folders.values())), length), lambda _: None)


def perplexity(log_probabilities):
    return float(np.exp(-log_probabilities.mean()))


def test_int8_costs_less_than_one_percent_of_perplexity(int8, expected):
    """The cost is relative to the perplexity of `transformers` in float32, on as many tokens as the caches hold."""
    (quantized,) = measured({"int8": int8})
    assert quantized.tokens == CACHE_LEN
    assert abs(quantized.perplexity.value / perplexity(expected) - 1) < 0.01


def test_both_artifacts_are_read_in_step(int8, folder, expected):
    """float32 is the baseline: its perplexity is that of `transformers`, up to rounding in another order."""
    fp32 = smollm2("fp32", folder)
    baseline, quantized = measured({"none": fp32, "int8": int8}, SHORT)
    assert (baseline.tokens, quantized.tokens) == (SHORT, SHORT)
    assert baseline.perplexity.value == pytest.approx(perplexity(expected[:SHORT]), rel=1e-5)
    assert (baseline.divergence.value, baseline.same_top.value) == (0, 100)
    assert 0 < quantized.divergence.value < 0.01
    assert quantized.same_top.value > 95
    assert quantized.weight_bytes < 0.27 * baseline.weight_bytes
