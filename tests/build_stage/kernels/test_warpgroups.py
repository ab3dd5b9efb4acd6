"""Products on the tensor cores of sm_90a, which have no serial form: on the emulated GPU, against numpy in float64."""

import pytest

from build.kernels.cuda.binding import LARGEST_SHARED_BYTES, MULTIPROCESSORS
from build.kernels.cuda.warpgroups import gemm
from build.kernels.cuda.warpgroups.ring import Stage
from build.kernels.cuda.warpgroups.tiling import WarpgroupTiling
from build.kernels.shapes import Linear
from tests.emulator.gpu import ORDERS, Run
from tests.helpers import kernels
from tests.helpers.cuda_products import CARRIED, FORMATS, NORM_EPS, check_tensor_cores, check_what_is_fused

# Copies come at once, as late as they may, or either.
RUNS = tuple(Run(order, checked=True) for order in ORDERS)


@pytest.fixture
def gpu(gpu_process):
    return kernels.EmulatedGpu(gpu_process, RUNS)


def tile_with(monkeypatch, rows, cluster, splits):
    """Let products have such tiles, whatever they are estimated to take."""
    monkeypatch.setattr(
        gemm,
        "tilings",
        lambda _rows, swiglu: [WarpgroupTiling(rows, cluster, splits, 2 if swiglu else 1)],
    )


# Rows, blocks of a cluster and parts of K of a tile, then the product's rows, N and K: one tile and less than one; more
# stages than the ring has, and fewer; blocks and clusters beyond N, and rows beyond the last.
PRODUCTS = [
    ((16, 1, 1), 16, 128, 64, "float16"),
    ((8, 1, 1), 16, 100, 40, "float16"),
    ((32, 2, 1), 64, 256, 840, "float16"),
    ((16, 2, 1), 16, 128, 640, "int8"),
    ((32, 4, 2), 70, 300, 1000, "int8"),
    ((24, 1, 3), 70, 150, 1536, "int4-zeros"),
    ((16, 2, 1), 40, 150, 960, "int4"),
    *(((16, 1, 2), 16, 150, 984, name) for name in CARRIED),  # a last group that is shorter
]


@pytest.mark.parametrize(("tile", "rows", "n", "k", "name"), PRODUCTS)
def test_product(gpu, monkeypatch, tile, rows, n, k, name):
    tile_with(monkeypatch, *tile)
    check_tensor_cores(gpu, rows, n, k, name, warpgroups=True)


FUSED = {
    "norm, SwiGLU and order": Linear((1, 20), 320, 1280, FORMATS["int4-order"], norm_eps=NORM_EPS, swiglu=True),
    "SwiGLU": Linear((1, 24), 448, 72, FORMATS["float16"], swiglu=True),
    "norm and residual": Linear((1, 16), 151, 600, FORMATS["int8"], norm_eps=NORM_EPS, residual=True),
}


@pytest.mark.parametrize(("cluster", "splits"), [(1, 2), (2, 1)])
@pytest.mark.parametrize("name", FUSED)
def test_what_is_fused_with_a_product(gpu, monkeypatch, name, cluster, splits):
    tile_with(monkeypatch, 16, cluster, splits)
    check_what_is_fused(gpu, FUSED[name], tensor_cores=True, warpgroups=True)


@pytest.mark.parametrize("name", ["float16", "int8", "int4", "int8-minimums"])
@pytest.mark.parametrize("rows", [16, 64, 300, 512])
def test_tiles_fill_a_device_and_rings_fit(rows, name):
    """The blocks of a 7B model's products fill an H200 to at least 7 tenths, in whole turns."""
    for n, k in ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)):
        swiglu = n == 28672
        chosen = gemm.best_tiling(FORMATS[name], rows, n // (1 + swiglu), k, swiglu=swiglu)
        blocks = chosen.blocks(rows, n // (1 + swiglu))
        assert blocks >= 0.7 * MULTIPROCESSORS * -(-blocks // MULTIPROCESSORS), (chosen, blocks)
        assert Stage.of(FORMATS[name], chosen).ring_bytes <= LARGEST_SHARED_BYTES
