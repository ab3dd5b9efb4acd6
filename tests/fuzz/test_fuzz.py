"""Each reader's known hostile inputs, and some spoiled ones that are the same each time; `make fuzz` tries more."""

import subprocess
import sys

import pytest

from export.stage import ROOT
from runtime.errors import UserError
from tests.fuzz import limits
from tests.fuzz.__main__ import Fuzzer
from tests.fuzz.mutations import spoil_json
from tests.fuzz.reader import Reader, WrongResult, names
from tests.fuzz.worker import run_cases

QUICK = ("golden_file", "manifest_json", "safetensors_file", "shard_index", "signature", "tensor_file")
AT_EXPORT = "template_at_export"  # a compile takes its time to try a template
# How many cases of which readers; those of a row share a process, since loading their libraries takes longest.
ROWS = {1000: QUICK, 20: (AT_EXPORT,), 150: tuple(sorted({*names()} - {*QUICK, AT_EXPORT}))}


@pytest.mark.parametrize("cases", ROWS)
def test_an_input_is_refused_in_one_sentence_or_read_rightly(cases):
    readers = [f"--reader={name}" for name in ROWS[cases]]
    command = [sys.executable, "-m", "tests.fuzz", *readers, "--seed", "0", "--cases", str(cases)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr


class Refusal(UserError):
    """A refusal that says just this, whatever other refusals make presentable."""

    def __init__(self, text):
        Exception.__init__(self, text)


def refuse(text):
    raise Refusal(text)


def wrong():
    raise WrongResult("other numbers")


def hang():
    while True:
        pass


def fill_memory():
    return bytearray(2**31)


def crash():
    import ctypes

    ctypes.string_at(0)


def refuse_without_memory():
    try:
        fill_memory()
    except MemoryError as error:
        raise UserError("x cannot be read") from error


@pytest.mark.parametrize(
    ("check", "kind"),
    [
        (lambda: None, None),
        (lambda: refuse("x is no y, expected z"), None),
        (lambda: refuse("x is\nno y"), "many lines or with control characters"),
        (lambda: refuse("x is \x1b[2J"), "many lines or with control characters"),
        (lambda: refuse(" "), "empty refusal"),
        (lambda: refuse("x" * 10_000), "endless refusal"),
        (wrong, "wrong result: other numbers"),
        (lambda: [][0], "IndexError in tests/fuzz/test_fuzz.py"),
        (hang, "of CPU time in tests/fuzz/test_fuzz.py"),
        (fill_memory, "MemoryError"),
        (refuse_without_memory, "more memory than allowed"),
        (crash, "SIGSEGV in tests/fuzz/test_fuzz.py"),
        (lambda: sys.exit(0), "SystemExit"),
    ],
)
def test_what_counts_as_a_finding(check, kind, monkeypatch):
    """A case that ends its process is followed by the next one in a new process."""
    monkeypatch.setattr(limits, "CPU_SECONDS", 0.5)
    reader = Reader([b"x"], lambda draw, data: data, lambda data: check() if data == b"odd" else None, {"odd": b"odd"})
    before, odd, after = run_cases(reader, ["1", "odd", "2"])
    assert (before.case, before.accepted, after.case, after.accepted) == ("1", True, "2", True)
    assert (odd.kind is None) == (kind is None)
    assert kind is None or kind in odd.kind


def test_a_finding_is_counted_and_its_input_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuzzer = Fuzzer({"x": Reader([b"x"], lambda draw, data: data, lambda data: refuse("x is\nno y"))})
    assert fuzzer.turn("x", ["1", "2", "3", "4", "5"]) == 5
    assert (fuzzer.findings, fuzzer.tallies["x"].row[:5]) == (5, ["5", "0", "0", "5", "1"])
    assert sorted(path.name for path in (tmp_path / "out" / "fuzz").iterdir()) == ["x-1", "x-2", "x-3"]
    assert (tmp_path / "out" / "fuzz" / "x-1").read_bytes() == b"x"


def test_a_number_determines_an_input():
    seeds = [b'{"a": 1, "b": [2, "x"]}', b"[1, 2]"]
    first, second = (Reader(seeds, spoil_json, refuse) for _ in range(2))
    inputs = [first.input_of(str(case)) for case in range(200)]
    assert inputs == [second.input_of(str(case)) for case in range(200)]
    assert len(set(inputs)) > 100
