"""CPU levels against LLVM's own tables and this kernel's /proc/cpuinfo."""

import itertools
import platform
import subprocess
from pathlib import Path

import pytest

from runtime.artifact.cpu import LEVELS, best_level, check_cpu, cpuinfo_flags, machine_features, missing_features
from runtime.errors import UserError

V3 = frozenset(LEVELS["x86-64-v3"].flags)


@pytest.fixture(scope="module")
def llvm_features():
    import tvm
    from tvm.target import codegen

    def features(cpu):
        target = tvm.target.Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": cpu})
        return [str(name) for name in codegen.llvm_get_cpu_features(target)]

    return features


@pytest.mark.parametrize("level", LEVELS)
def test_levels_are_those_of_llvm(llvm_features, level):
    assert cpuinfo_flags(llvm_features(level)) == tuple(sorted(LEVELS[level].flags))


def test_named_cpus_map_to_their_flags(llvm_features):
    zen4, rapids = cpuinfo_flags(llvm_features("znver4")), cpuinfo_flags(llvm_features("sapphirerapids"))
    assert set(LEVELS["x86-64-v4"].flags) < set(zen4)
    assert {"avx512_vnni", "avx512_bf16", "avx512_vbmi2", "sse4a"} <= set(zen4)
    assert {"amx_tile", "amx_int8", "amx_bf16", "avx_vnni", "avx512_fp16"} <= set(rapids)
    assert not {"avx_vnni", "amx_tile"} & set(zen4)


def test_levels_ascend():
    flags = [set(level.flags) for level in LEVELS.values()]
    assert all(low < high for low, high in itertools.pairwise(flags))


def test_machine_features_are_what_grep_sees():
    """The flags of this machine, as another program reads them; on another architecture there are none."""
    line = subprocess.run(
        ["grep", "-m1", "^flags", "/proc/cpuinfo"], capture_output=True, text=True, check=False
    ).stdout
    assert machine_features() == frozenset(line.partition(":")[2].split())
    assert (platform.machine() == "x86_64") == bool(machine_features())


def test_machine_features_of_unequal_processors(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text(
        "processor\t: 0\nflags\t\t: sse2 avx amx_tile\nvmx flags\t: ept\n\nprocessor\t: 1\nflags\t\t: sse2 avx\n"
    )
    assert machine_features(info) == {"sse2", "avx"}


def test_machine_features_without_flags(tmp_path):
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nFeatures\t: fp asimd\n")
    assert machine_features(info) == frozenset()
    assert machine_features(Path("/nowhere/cpuinfo")) == frozenset()


def test_missing_features_keep_their_order():
    assert missing_features(("z", "b", "a"), frozenset("b")) == ("z", "a")


@pytest.mark.parametrize("level", LEVELS)
def test_best_level(level):
    assert best_level(frozenset(LEVELS[level].flags) | {"unrelated"}) == level


def test_one_missing_flag_lowers_the_level():
    assert best_level(V3 - {"movbe"}) == "x86-64-v2"


def test_check_cpu_accepts_what_is_there():
    check_cpu(LEVELS["x86-64-v3"].flags, "x86-64-v3", V3 | {"avx512f"})


def test_check_cpu_names_flag_level_and_remedy():
    needs_vl = LEVELS["x86-64-v4"].flags
    features = frozenset(needs_vl) - {"avx512f"}
    with pytest.raises(UserError) as error:
        check_cpu(needs_vl, "x86-64-v4", features)
    assert str(error.value) == (
        "this machine lacks avx512f, which the artifact's cpu level x86-64-v4 needs; "
        "compile again with backend.cpu: x86-64-v3"
    )


def test_check_cpu_shortens_a_long_list():
    with pytest.raises(UserError, match=r"lacks a, b, c, d, e and 2 more, which"):
        check_cpu("abcdefg", "znver9", V3)


def test_check_cpu_elsewhere_names_the_architecture():
    with pytest.raises(UserError, match=rf"this machine is {platform.machine()} and shows no x86 CPU flags"):
        check_cpu(LEVELS["x86-64-v3"].flags, "x86-64-v3", frozenset())


def test_no_level_names_the_architecture():
    with pytest.raises(UserError, match=platform.machine()):
        best_level(frozenset({"asimd"}))
