"""The memory command must report what the kernel reports; its checkpoint must be one that transformers reads."""

import sys

import numpy as np
import pytest
from transformers import AutoConfig, MistralForCausalLM

from build.tools import memory as module
from build.tools.memory import Compile, Usage, largest_tensor, measure, results_table, run_measured, slope
from build.tools.random_checkpoint import SHAPES, write_random_checkpoint
from export.checkpoints.checkpoint import open_checkpoint
from runtime.errors import UserError

MB = 10**6
ALLOCATE = "import mmap, time; a = bytearray(100 * 10**6); time.sleep(0.3)"
MAP_A_FILE = (
    "import mmap, sys, time; f = open(sys.argv[1]); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); "
    "sum(m[::4096]); time.sleep(0.3)"
)
FORKED = f"import os, time; {ALLOCATE.rpartition(';')[0]}; pid = os.fork(); time.sleep(0.3); pid and os.waitpid(pid, 0)"
IN_A_CHILD = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {ALLOCATE!r}])"


@pytest.mark.parametrize("program", [ALLOCATE, IN_A_CHILD, FORKED])
def test_anonymous_memory_counts_children_too(tmp_path, program):
    # 100 MB are written; an interpreter takes about 5 MB itself, and two of them run in the second case. A fork that
    # has not loaded a program of its own shares its parent's memory, which is counted once.
    assert 100 * MB < run_measured([sys.executable, "-c", program], tmp_path).peak_bytes < 130 * MB


def test_mapped_files_do_not_count(tmp_path):
    (tmp_path / "file").write_bytes(bytes(100 * MB))
    assert run_measured([sys.executable, "-c", MAP_A_FILE, "file"], tmp_path).peak_bytes < 30 * MB


def test_a_failing_stage_is_named(tmp_path):
    with pytest.raises(UserError, match="-c raise SystemExit\\(3\\) ended with status 3"):
        run_measured([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)


def test_transformers_reads_the_checkpoint_as_we_do(tmp_path):
    folder = tmp_path / "checkpoint"
    write_random_checkpoint(folder, "tiny", 2)
    model, loading = MistralForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values())  # nothing missing, unexpected or mismatched
    assert AutoConfig.from_pretrained(folder).num_hidden_layers == 2
    ours = open_checkpoint(folder, "auto", {})
    theirs = model.state_dict()
    assert ours.source_bytes == sum(2 * tensor.numel() for tensor in theirs.values())
    head = ours.tensor("output.weight").astype(np.float32)
    np.testing.assert_array_equal(head, theirs["lm_head.weight"].float().numpy())
    assert 0.015 < head.std() < 0.025
    with pytest.raises(UserError, match="is not empty"):
        write_random_checkpoint(folder, "tiny", 2)


def test_seven_billion_parameters():
    # Mistral-7B-v0.2 has 7,241,732,096 parameters (its model card's safetensors metadata).
    family_and_model = module.model_config("7b", SHAPES["7b"]["num_hidden_layers"])
    weights = module.tensor_layout.weights(*family_and_model)
    assert sum(int(np.prod(weight.shape)) for weight in weights.values()) == 7_241_732_096
    assert largest_tensor("7b") == ("tok_embeddings.weight", 32000 * 4096 * 4)


def test_growth_is_extended_in_a_straight_line():
    assert slope([2, 4], [10.0, 16.0]) == 3.0
    compiles = [
        Compile(n, {"export": Usage((100 + 2 * n) * MB, 1.0), "build": Usage(50 * MB, 2.0)}, n * MB) for n in (2, 4)
    ]
    table = results_table(compiles, 32, 20 * MB)
    rows = list(zip(*(column.cells for column in table.columns), strict=True))
    assert rows[0] == ("export: peak, MB", "104.0", "108.0", "2.0", "164.0", "8.2")
    assert rows[1] == ("build: peak, MB", "50.0", "50.0", "0.0", "50.0", "2.5")
    assert rows[4] == ("artifact, MB", "2.0", "4.0", "1.0", "32.0", "")


@pytest.mark.slow
def test_a_whole_compile_is_measured_and_cleaned_up(tmp_path):
    found = measure("tiny", 1, "int8", "llvm", tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert found.artifact_bytes > 85_000  # the parameters of one tiny layer, embedding and head, in int8 or wider
    for usage in found.stages.values():
        assert 50 * MB < usage.peak_bytes < 2000 * MB  # torch or TVM loaded, and little else
        assert usage.seconds > 0.5
