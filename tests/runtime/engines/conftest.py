"""The CUDA engine without a GPU: its kernels in their serial form, over a stand-in for the CUDA runtime."""

from types import SimpleNamespace

import pytest

from tests.helpers.artifacts import WINDOW, Case, exported
from tests.helpers.serial import compile_serial, serial_engine, stub_engine

CACHE_LEN = 24
SHAPE = {"prefill_chunk": 6, "cache_len": CACHE_LEN, "slots": 3}
CASES = {
    "windowed": Case({"sliding_window": WINDOW}, {"shape": SHAPE}),
    "full": Case(
        {"sliding_window": None, "num_hidden_layers": 1, "head_dim": 32},
        {"shape": SHAPE, "quantize": {"cache": "int8"}},
    ),
}


@pytest.fixture(scope="session", params=CASES)
def engines(request, tmp_path_factory):
    """An engine that draws as a GPU does, and one whose host draws; both have the same kernels."""
    folder = tmp_path_factory.mktemp(request.param)
    _, graphs = exported(request.param, folder / "case", CASES[request.param])
    manifest = compile_serial(graphs, folder)
    return SimpleNamespace(
        device=stub_engine(manifest, folder),
        host=serial_engine(manifest, folder),
        full=request.param == "full",
    )
