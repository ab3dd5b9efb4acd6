"""The bench of matrix products: what it is asked for, the weights that it multiplies, and its table."""

import pytest

from build.bench import kernels as module
from build.bench.formats import FORMATS
from build.bench.kernels import Case, Limits, Timing, measure, packed_weights, timings_table
from build.bench.timing import in_turns
from build.kernels.cpu.level import LEVELS
from build.kernels.cpu.limits import READERS, Reader, peak_of, peaks
from export.weights.table import panel_layout
from runtime.benchmarks.spread import Spread
from runtime.errors import UserError

BY_NAME = {level.name: level for level in LEVELS}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--levels", "avx3"], "--levels names 'avx3', expected some of .*avx2"),
        (["--formats", "int9"], "--formats names 'int9', expected some of float32"),
        (["--rows", "0"], "'0' is not a list of token counts"),
        (["--sizes", "64x0"], "--sizes is '64x0', expected N and K of each matrix, such as"),
        (["--sizes", "64"], "--sizes is '64', expected N and K"),
        (["--threads", "0"], "--threads is 0, expected at least 1"),
    ],
)
def test_what_cannot_be_measured_is_refused(flags, message):
    with pytest.raises(UserError, match=message):
        module.main(flags)


@pytest.mark.parametrize("name", FORMATS)
def test_weights_lie_as_kernels_read_them(name):
    case = Case(name, 1, (96, 128))
    layout = panel_layout(FORMATS[name], 96, 128)
    main, *beside = packed_weights(case)
    assert (main.shape, str(main.dtype)) == (layout.shape, layout.dtype)
    assert len(beside) == sum(part is not None for part in (layout.scales, layout.offsets, layout.order))


@pytest.mark.parametrize("rows", [1, 64])
def test_a_product_is_timed_beside_its_limit(monkeypatch, rows):
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    monkeypatch.setattr(module, "READ_BYTES", 2**16)
    monkeypatch.setattr("build.bench.probes.READ_BYTES", 2**20)
    monkeypatch.setattr(module, "best_reader", lambda *_: Reader(3, 0))
    levels = [BY_NAME["avx2"], BY_NAME["any"]]
    timings = measure(Case("float32", rows, (64, 64)), levels, Limits(levels, 1), 0.0)
    assert [timing.level for timing in timings] == ["avx2", "any"]
    assert {timing.limit for timing in timings} == {"reading" if rows == 1 else "float32"}
    for timing in timings:
        assert timing.least_s <= timing.spread.low
        work = 4 * 64 * 64 if rows == 1 else 2 * rows * 64 * 64
        assert timing.rate == pytest.approx(work / timing.least_s / 1e9)


def test_the_table_shows_the_share_of_the_limit():
    few = Timing(Case("int8", 1, (64, 32)), "avx2", 1e-5, Spread(1e-5, 2e-5, 3e-5), "reading", 10.0, 20.0)
    many = Timing(Case("int8", 64, (64, 32)), "avx2", 1e-3, Spread(1e-3, 2e-3, 3e-3), "float32", 50.0, 200.0)
    rows = list(zip(*(column.cells for column in timings_table([few, many]).columns), strict=True))
    assert rows[0] == ("int8", "1", "64x32", "avx2", "10", "10-30", "10.0 GB/s", "20.0", "0.50", "reading")
    assert rows[1][4:] == ("1,000", "1,000-3,000", "50 GFLOP/s", "200", "0.25", "float32")


def test_calls_take_turns():
    order = []
    samples = in_turns([lambda: order.append("a"), lambda: order.append("b")], 0.0, least=2)
    assert order == [*"ab", *"ab", *"ba"]  # the first two are not counted
    assert [len(taken) for taken in samples] == [2, 2]


@pytest.mark.parametrize("reader", READERS, ids=str)
def test_a_reader_reads_nearly_everything_once(reader):
    nbytes, threads = 2**20, 3
    most = threads * reader.streams * reader.lines * 64
    assert nbytes - most < reader.bytes_read(nbytes, threads) <= nbytes


@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.name)
@pytest.mark.parametrize("name", FORMATS)
def test_every_product_has_a_peak(level, name):
    for rows in (1, 512):
        peak, times = peak_of(level, FORMATS[name], rows)
        assert peak in peaks(level)
        assert times in (1, 2)


def test_sizes_are_pairs():
    assert module.sizes("64x32,8x16") == [(64, 32), (8, 16)]
