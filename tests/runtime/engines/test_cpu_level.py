"""Which CPU level of an artifact runs."""

import subprocess
import sys

import pytest

from runtime.artifact.cpu import machine_features
from runtime.artifact.manifest import CpuLevel
from runtime.engines import amx
from runtime.engines import cpu_level as module
from runtime.engines.amx import AMX_FEATURES, request_amx
from runtime.engines.cpu_level import VARIABLE, chosen_level, usable_features
from runtime.errors import UserError

LOW = CpuLevel(cpu="low", features=("avx2",))
MIDDLE = CpuLevel(cpu="middle", features=("avx2", "avx512f"))
TILES = CpuLevel(cpu="tiles", features=("avx2", "avx512f", *sorted(AMX_FEATURES)))
LEVELS = (LOW, MIDDLE, TILES)


@pytest.fixture
def machine(monkeypatch):
    """A machine with these flags, whose system allows AMX or not."""
    monkeypatch.delenv(VARIABLE, raising=False)

    def have(*flags, allows_amx=True):
        monkeypatch.setattr(module, "machine_features", lambda: frozenset(flags))
        monkeypatch.setattr("runtime.artifact.cpu.machine_features", lambda: frozenset(flags))
        monkeypatch.setattr(module, "request_amx", lambda: allows_amx)

    return have


@pytest.mark.parametrize(
    ("flags", "allows_amx", "expected"),
    [
        (LOW.features, True, LOW),
        (MIDDLE.features, True, MIDDLE),
        (TILES.features, True, TILES),
        (TILES.features, False, MIDDLE),
    ],
)
def test_the_best_level_that_the_machine_has_runs(machine, flags, allows_amx, expected):
    machine(*flags, allows_amx=allows_amx)
    assert chosen_level(LEVELS) is expected
    assert usable_features() == frozenset(expected.features)


def test_a_lower_level_is_forced(machine, monkeypatch):
    machine(*TILES.features)
    for level in LEVELS:
        monkeypatch.setenv(VARIABLE, level.cpu)
        assert chosen_level(LEVELS) is level
    monkeypatch.setenv(VARIABLE, "")
    assert chosen_level(LEVELS) is TILES


def test_a_level_that_cannot_be_forced_is_one_sentence(machine, monkeypatch):
    machine(*TILES.features, allows_amx=False)
    monkeypatch.setenv(VARIABLE, "tiles")
    lacks = "RUNTIME_CPU_LEVEL is tiles, but this machine lacks amx_bf16, amx_int8, amx_tile; name a lower level"
    with pytest.raises(UserError, match=lacks):
        chosen_level(LEVELS)
    monkeypatch.setenv(VARIABLE, "znver9")
    with pytest.raises(
        UserError, match="is 'znver9', but the artifact has the cpu levels low, middle, tiles; name one"
    ):
        chosen_level(LEVELS)


def test_an_artifact_for_tiles_alone_where_they_are_not_allowed(machine):
    machine(*TILES.features, allows_amx=False)
    with pytest.raises(UserError, match="may not use amx_bf16, amx_int8, amx_tile, which the artifact's lowest cpu"):
        chosen_level([TILES])


def test_nothing_is_requested_for_code_without_tiles(machine, monkeypatch):
    machine(*TILES.features)
    monkeypatch.setattr(module, "request_amx", lambda: pytest.fail("AMX was requested"))
    assert chosen_level([LOW, MIDDLE]) is MIDDLE


def test_no_request_where_the_processor_has_no_tiles(monkeypatch):
    monkeypatch.setattr(amx, "machine_features", lambda: frozenset({"avx512f"}))
    assert not request_amx.__wrapped__()


@pytest.mark.skipif(not machine_features() >= AMX_FEATURES, reason="this machine lacks AMX")
def test_the_request_gives_permission():
    """As the system itself reports it: ARCH_GET_XCOMP_PERM."""
    code = """
import ctypes
from runtime.engines.amx import ARCH_PRCTL, TILE_DATA, request_amx
allowed = ctypes.c_uint64()
answer = request_amx()
assert ctypes.CDLL(None).syscall(ARCH_PRCTL, 0x1022, ctypes.byref(allowed)) == 0
assert answer == bool(allowed.value >> TILE_DATA & 1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
