"""Weights copied into huge pages."""

import re
from pathlib import Path

import numpy as np
import pytest

from runtime.engines.engine import Engine
from runtime.engines.huge_pages import HUGE_PAGE, VARIABLE, in_huge_pages, wants_huge_pages
from runtime.errors import UserError

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
NEVER = not SETTING.is_file() or "[never]" in SETTING.read_text()


def huge_kilobytes(address):
    """How much of the mapping that holds an address of this process lies in huge pages, by the kernel's own count."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1])
    raise AssertionError(f"{address:#x} is not mapped")


@pytest.mark.parametrize("nbytes", [1, HUGE_PAGE, 2 * HUGE_PAGE + 12345])
def test_a_copy_has_the_bytes_of_the_file_from_a_huge_page_on(tmp_path, nbytes):
    expected = np.random.default_rng(0).integers(0, 256, nbytes, np.uint8)
    (tmp_path / "weights").write_bytes(expected.tobytes())
    copy = in_huge_pages(tmp_path / "weights")
    assert np.array_equal(copy, expected)
    assert copy.ctypes.data % HUGE_PAGE == 0
    copy[0] ^= 1
    assert (tmp_path / "weights").read_bytes() == expected.tobytes()


@pytest.mark.skipif(NEVER, reason="this machine's Linux gives no huge pages")
def test_it_lies_in_huge_pages(tmp_path):
    (tmp_path / "weights").write_bytes(bytes(8 * HUGE_PAGE))
    assert huge_kilobytes(in_huge_pages(tmp_path / "weights").ctypes.data) > 0


def test_a_file_that_shrinks_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(bytes(100))
    longer = path.stat()
    path.write_bytes(bytes(60))
    monkeypatch.setattr(Path, "stat", lambda _self: longer)
    with pytest.raises(UserError, match="has shrunk since it was opened: expected 100 bytes, but 60 are left"):
        in_huge_pages(path)


@pytest.mark.parametrize(("text", "expected"), [("", False), ("0", False), ("1", True)])
def test_the_environment_asks_for_them(monkeypatch, text, expected):
    monkeypatch.setenv(VARIABLE, text)
    assert wants_huge_pages() is expected


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(UserError, match="RUNTIME_HUGE_PAGES is 'yes', expected 1 for weights in huge pages, or 0"):
        wants_huge_pages()


def test_results_have_the_same_bits(compile_case, monkeypatch):
    folder = compile_case("windowed").artifact
    monkeypatch.delenv(VARIABLE, raising=False)
    mapped = Engine.open(folder).prefill(0, [1, 2, 3]).copy()
    monkeypatch.setenv(VARIABLE, "1")
    assert np.array_equal(Engine.open(folder).prefill(0, [1, 2, 3]), mapped)
