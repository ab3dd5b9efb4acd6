"""Fixtures for kernels of every target."""

import pytest

from build.kernels.cpu.level import LEVELS
from runtime.artifact.cpu import missing_features
from tests.emulator.gpu import Run
from tests.helpers import kernels

# Each call on the emulated GPU, with all checks.
RUNS = (Run("reverse", checked=True), Run("random", checked=True))


@pytest.fixture(params=["serial", "emulated"])
def gpu(request):
    """What compiles and runs the kernels of a GPU: in their serial form, and on the emulated GPU."""
    if request.param == "serial":
        return kernels.SerialForm()
    return kernels.EmulatedGpu(request.getfixturevalue("gpu_process"), RUNS)


@pytest.fixture(params=kernels.WIDTHS)
def width(request):
    """The processor for one width of registers, as far as this machine has them."""
    needed = next(level.flags for level in LEVELS if level.name == kernels.WIDTH_LEVELS[request.param])
    if missing := missing_features(needed):
        pytest.skip(f"this machine lacks {', '.join(missing)}")
    return kernels.WIDTHS[request.param]


@pytest.fixture
def optimized(width, monkeypatch):
    """Serial forms of GPU kernels are optimized, for one width of registers."""
    monkeypatch.setattr(kernels, "SERIAL_FORM", {"processor": width})
