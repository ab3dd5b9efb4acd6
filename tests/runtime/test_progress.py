"""The line that counts bytes: right when threads share it, and absent where nobody watches."""

import io
from concurrent.futures import ThreadPoolExecutor

import pytest

from runtime.progress import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()])
def test_bytes_are_counted_on_a_terminal_alone(stream, monkeypatch):
    monkeypatch.setattr("sys.stderr", stream)
    with progress("sending", 4_000_000_000) as advance, ThreadPoolExecutor(8) as pool:
        list(pool.map(advance, [100_000_000] * 40))
    lines = stream.getvalue().split("\r")
    if not stream.isatty():
        assert lines == [""]
        return
    assert len(lines) == 41
    assert lines[1].startswith("sending   0.10 of 4.00 GB, ")
    assert lines[-1].startswith("sending   4.00 of 4.00 GB, ")
    assert lines[-1].endswith(" MB/s \n")
