"""The startup report, against the clock and the system's own figures."""

import time

import pytest

from runtime.errors import UserError
from runtime.startup import PHASES, Sample, main, sample, table


def test_a_sample_has_every_phase(compile_case):
    """All phases lie between the start and the end of the process.

    numpy's and TVM's libraries alone are more than 10 MB of mapped files.
    """
    start = time.monotonic()
    found = sample(compile_case("windowed").artifact, 1)
    elapsed = time.monotonic() - start
    assert len(found.seconds) == len(PHASES)
    assert min(found.seconds) > 0
    assert sum(found.seconds) < elapsed
    assert found.mapped_mb > 10
    assert found.own_mb > 0


def test_table_gives_medians():
    """The median of three processes is the middle one."""
    samples = [Sample((0.001 * n,) * len(PHASES), 40.0 * n, 100.0 * n) for n in (1, 3, 2)]
    lines = table(samples).splitlines()
    assert [line.split()[-2:] for line in lines[: len(PHASES)]] == [["2", "ms"]] * len(PHASES)
    assert " 10  ms, median of 3 processes" in lines[len(PHASES)]
    assert " 80  MB" in lines[-2]
    assert "200  MB, pages" in lines[-1]


def test_a_start_that_fails_says_so(tmp_path, capfd):
    with pytest.raises(UserError, match="ended with status 2; its own message is above"):
        sample(tmp_path / "none", 1)
    assert "error: " in capfd.readouterr().err


def test_no_repeats_are_refused(tmp_path):
    with pytest.raises(UserError, match="--repeats is 0, expected at least 1"):
        main([str(tmp_path), "--repeats", "0"])
