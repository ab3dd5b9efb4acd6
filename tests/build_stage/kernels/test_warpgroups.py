"""Products on the tensor cores of sm_90a, which only the emulated GPU runs, against numpy in float64."""

import pytest

from build.kernels.cuda import warpgroup_gemm
from build.kernels.cuda.warpgroup_tiling import WarpgroupTiling
from tests.build_stage.kernels.test_cuda import check_tensor_cores
from tests.emulator.gpu import Run
from tests.helpers import kernels

RUNS = (
    Run("forward", checked=True),
    Run("reverse"),
    Run("random", 1, checked=True),
    Run("random", 2),
    Run("random", 3),
)


@pytest.fixture
def gpu(gpu_process):
    return kernels.EmulatedGpu(gpu_process, RUNS)


CASES = [
    ((16, 1, 1), 16, 128, 64, "float16"),
    ((16, 1, 1), 16, 128, 512, "float16"),
    ((32, 2, 1), 64, 256, 512, "float16"),
    ((32, 4, 2), 70, 300, 1000, "int8"),
    ((24, 1, 3), 70, 300, 2048, "int4-zeros"),
]


@pytest.mark.parametrize(("tile", "rows", "n", "k", "name"), CASES)
def test_product(gpu, monkeypatch, tile, rows, n, k, name):
    monkeypatch.setattr(warpgroup_gemm, "tilings", lambda _rows, swiglu: [WarpgroupTiling(*tile, 2 if swiglu else 1)])
    check_tensor_cores(gpu, rows, n, k, name, warpgroups=True)
