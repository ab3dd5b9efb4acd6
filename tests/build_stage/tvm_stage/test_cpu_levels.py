"""Several CPU levels in one artifact: which there are, and that each of their libraries computes the same."""

import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from build.compiler import codegen, tvm
from build.kernels.cpu.level import LEVELS, level_of
from build.tvm_stage import cpu_levels as module
from build.tvm_stage.cpu_levels import attributes_of, cpu_levels, native_cpu
from build.tvm_stage.level_libraries import LevelTask, _compile_unless_known, environment
from build.tvm_stage.target import target_spec
from export.configuration.config import BackendConfig
from runtime.artifact.consistency import library_file
from runtime.artifact.cpu import missing_features
from runtime.engines.cpu_level import VARIABLE, chosen_level, missing_of, usable_features
from runtime.engines.engine import Engine
from runtime.errors import UserError
from tests.helpers.artifacts import bound, onnx_shifted, random_ids
from tests.helpers.feeding import stepwise


def names(levels):
    return [level.cpu for level in levels]


def test_levels_are_sorted_from_the_lowest_on():
    assert names(cpu_levels(["sapphirerapids", "x86-64-v4", "x86-64-v3", "alderlake", "znver4"])) == [
        "x86-64-v3",
        "alderlake",
        "x86-64-v4",
        "znver4",
        "sapphirerapids",
    ]


def test_of_levels_that_kernels_treat_alike_the_one_that_most_machines_have_is_the_lowest():
    assert names(cpu_levels(["rocketlake", "cascadelake"])) == ["cascadelake", "rocketlake"]


def test_a_level_that_is_named_twice_is_one():
    assert names(cpu_levels([native_cpu(), "native"])) == [native_cpu()]


def test_native_is_the_best_that_this_machine_has():
    """Whatever LLVM takes the machine for."""
    (level,) = cpu_levels(["native"])
    have = usable_features()
    assert not missing_features(level.features, have)
    assert level_of(level.features) is level_of(have)


def test_native_where_llvm_takes_the_machine_for_an_older_one(monkeypatch):
    monkeypatch.setattr(module.codegen, "llvm_get_system_cpu", lambda: "nehalem")
    monkeypatch.setattr(module, "runnable_levels", lambda: LEVELS[-2:])
    assert native_cpu() == LEVELS[-2].cpu == "x86-64-v3"


def test_an_unknown_name_is_one_sentence():
    with pytest.raises(UserError, match=r"backend\.cpu names 'pentium9', which LLVM does not know; expected native"):
        cpu_levels(["x86-64-v3", "pentium9"])


def test_code_for_one_vendor_runs_on_the_other():
    """LLVM's znver4 has SSE4a, which only AMD's processors have: neither may code use it, nor is it asked for."""
    (zen4,) = cpu_levels(["znver4"])
    assert "sse4a" not in zen4.features
    target = tvm.target.Target({"kind": "llvm", "mcpu": "znver4", "mattr": attributes_of(zen4)})
    assert "sse4a" not in {str(name) for name in codegen.llvm_get_cpu_features(target)}


def test_the_default_is_one_library_for_every_machine():
    spec = target_spec(BackendConfig(target="llvm"))
    assert names(spec.levels) == ["x86-64-v3", "alderlake", "x86-64-v4", "znver4", "sapphirerapids"]
    assert [library_file(spec, level) for level in spec.levels[:2]] == ["library.so", "library.alderlake.so"]
    assert names(target_spec(BackendConfig(target="cuda")).levels) == ["x86-64-v3"]


@pytest.fixture(scope="module")
def case(compile_case):
    return compile_case("levels")


def test_a_level_that_changes_no_kernel_is_left_out(case):
    """Haswell is an AVX2 processor like x86-64-v3, and so may be this machine."""
    listed = cpu_levels(case.config.backend.cpu)
    assert "haswell" in names(listed)
    manifest = Engine.open(case.artifact).manifest
    first_of_each = {level_of(level.features).name: level.cpu for level in reversed(listed)}
    assert set(names(manifest.target.levels)) <= {*first_of_each.values()}
    assert names(manifest.target.levels)[:2] == ["x86-64-v3", "x86-64-v4"]
    libraries = {library_file(manifest.target, level) for level in manifest.target.levels}
    assert {path.name for path in case.artifact.glob("library*")} == libraries


def test_every_level_computes_what_its_graphs_do(case, monkeypatch):
    """As a chunk and as steps, on each level that this machine can run."""
    ids = random_ids(9, case.graphs.record.model.vocab_size)
    expected = onnx_shifted(case.graphs).feed([ids], [4, 1, 4])
    levels = Engine.open(case.artifact).manifest.target.levels
    fitting = [level for level in levels if not missing_of(level)]
    assert fitting
    for level in fitting:
        monkeypatch.setenv(VARIABLE, level.cpu)
        engine = Engine.open(case.artifact, threads=1)
        assert engine.cpu_level == level.cpu
        engine.prefill(0, ids[:4])
        logits = stepwise(engine, 0, ids[4:])[-1:]
        assert np.abs(logits - expected).max() / np.abs(expected).max() < bound(case.graphs), level.cpu
    monkeypatch.delenv(VARIABLE)
    assert Engine.open(case.artifact).cpu_level == fitting[-1].cpu == chosen_level(levels).cpu


def test_libraries_of_levels_use_their_own_instructions(case):
    """The code of the lowest level has no register of 512 bits, and that for x86-64-v4 uses whole ones."""
    found = {}
    for name in ("library.so", "library.x86-64-v4.so"):
        text = subprocess.run(
            ["objdump", "-d", "--no-show-raw-insn", case.artifact / name], stdout=subprocess.PIPE, text=True, check=True
        ).stdout
        found[name] = len(re.findall(r"vfmadd\w+ .*%zmm", text))
    assert found["library.so"] == 0
    assert found["library.x86-64-v4.so"] > 0


def test_a_level_that_cannot_be_compiled_is_one_sentence(tmp_path, capfd):
    spec = target_spec(BackendConfig(target="llvm", cpu=("x86-64-v3",)))
    task = LevelTask("no module", (), False, spec, tmp_path / "library.so")
    with pytest.raises(UserError, match="compiling for the cpu level x86-64-v3 ended with status 1; its own message"):
        _compile_unless_known(task, None, [])
    assert "Error" in capfd.readouterr().err


def test_a_process_for_a_level_ends_with_the_one_that_started_it(tmp_path):
    """It reads the end of its standard input where it waits for an answer, and writes no library."""
    spec = target_spec(BackendConfig(target="llvm", cpu=("x86-64-v3",)))
    task = LevelTask(tvm.ir.save_json(tvm.IRModule({})), (), False, spec, tmp_path / "library.so")
    command = [sys.executable, "-m", "build.tvm_stage.level_libraries"]
    done = subprocess.run(command, input=pickle.dumps(task), stdout=subprocess.PIPE, check=True, env=environment())
    assert done.stdout == b"\n"
    assert not (tmp_path / "library.so").exists()
