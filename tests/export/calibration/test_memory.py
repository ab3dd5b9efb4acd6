"""The memory that a calibration takes: what `export.memory_use` predicts of it, and no more for more layers."""

import json
import subprocess
import sys

import pytest

from build.tools.random_checkpoint import SHAPES, headers, write_random_checkpoint
from export.memory_use import calibration_bytes
from export.stage import ROOT
from export.weights.storing import record_of
from runtime.artifact.manifest import Quantization

# Wide enough that second moments (9 MB) stand out.
SHAPE = {
    **SHAPES["tiny"],
    "hidden_size": 128,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 16,
}
MEASURE = """
import json, sys
from pathlib import Path
import numpy as np
from export.calibration.calibrate import calibrated
from export.calibration.methods import LENGTH
from export.calibration.results import LayerResults
from export.checkpoints.checkpoint import open_checkpoint
from export.peak_memory import return_freed_blocks
from export.weights.storing import record_of
from export.workspace import growing_stage
from runtime.artifact.manifest import Quantization
from runtime.process_memory import peak_memory
return_freed_blocks()
folder, method = Path(sys.argv[1]), sys.argv[2]
checkpoint = open_checkpoint(folder / "checkpoint", "auto", {})
record = record_of(checkpoint, Quantization(scheme="int4", method=method), "fp32", {})
before = peak_memory()
ids = np.random.default_rng(0).integers(0, checkpoint.model.vocab_size, (2, LENGTH))
calibrated(checkpoint, record, ids, LayerResults(growing_stage(folder, "layers", "0" * 20)))
print(json.dumps(peak_memory() - before))
"""


def measured(folder, method, layers):
    """The growth of a process's peak over what it had loaded, in bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "wide", SHAPE)
        write_random_checkpoint(folder / "checkpoint", "wide", layers)
    command = [sys.executable, "-c", MEASURE, str(folder), method]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_it_does_not_follow_the_depth(tmp_path):
    """Of two more layers nothing is left, not even the 13 MB of their second moments; and no more is held at once than
    is predicted, besides what the libraries load when they first compute: under 150 MB with these versions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "wide", SHAPE)
        record = record_of(headers("wide", {}), Quantization(scheme="int4", method="gptq"), "fp32", {})
    two, four = (measured(tmp_path / str(layers), "gptq", layers) for layers in (2, 4))
    assert four < two + 8e6
    assert two < calibration_bytes(record) + 150e6


def test_seven_billion_parameters_stay_within_six_gigabytes():
    record = record_of(headers("7b", {}), Quantization(scheme="int4", method="gptq"), "fp16", {})
    assert calibration_bytes(record) < 5.5e9  # half a gigabyte is for what is loaded
