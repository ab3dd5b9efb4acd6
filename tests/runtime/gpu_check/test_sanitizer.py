"""What compute-sanitizer says: a stand-in writes it, in the words of its manual."""

import pytest

from runtime.gpu_check import sanitizer
from runtime.gpu_check.process_group import OutOfTimeError, UnfinishedError
from runtime.gpu_check.sanitizer import find_sanitizer, sanitize
from tests.helpers.shipped import executable

LAUNCH = ("echo", '{"launched": 9}')
HEADING = "echo ========= COMPUTE-SANITIZER; "
WRITE = "========= Invalid __global__ write of size 4 bytes"


def found(tmp_path, body, seconds=60):
    command = str(executable(tmp_path / "compute-sanitizer", f"{HEADING}tool=$2; shift 2; {body}"))
    return sanitize(command, "memcheck", "checks/tiny", LAUNCH, seconds)


@pytest.mark.parametrize(
    ("summary", "ok"),
    [
        ("ERROR SUMMARY: 0 errors", True),
        ("RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True),
        ("ERROR SUMMARY: 12 errors", False),
        ("RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)", False),
    ],
)
def test_the_summary_says_whether_all_is_right(tmp_path, summary, ok):
    result = found(tmp_path, f'"$@"; echo "{WRITE}"; echo "========= $tool" >&2; echo "========= {summary}"')
    assert (result.tool, result.folder, result.kernels) == ("memcheck", "checks/tiny", 9)
    assert (result.summary, result.ok) == (summary.partition(": ")[2], ok)
    assert (WRITE in result.output and "========= memcheck" in result.output) == (not ok)


def test_what_is_found_counts_even_where_the_kernel_fails(tmp_path):
    result = found(tmp_path, f'echo "{WRITE}"; echo "========= ERROR SUMMARY: 1 error"; exit 2')
    assert (result.kernels, result.summary, result.ok) == (0, "1 error", False)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('echo "========= ERROR SUMMARY: 0 errors"', "no kernel was launched"),
        ('echo "========= ERROR SUMMARY: 0 errors"; echo lost; exit 3', "it ended with status 3: lost"),
        ('"$@"', "========= COMPUTE-SANITIZER"),
        (
            'echo "========= Error: Device not supported"; echo "========= ERROR SUMMARY: 1 error"',
            "========= COMPUTE-SANITIZER ========= Error: Device not supported",
        ),
    ],
)
def test_without_an_answer_there_is_a_reason(tmp_path, body, reason):
    with pytest.raises(UnfinishedError) as raised:
        found(tmp_path, body)
    assert str(raised.value) == reason


def test_a_tool_that_says_nothing_is_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(sanitizer, "LONGEST", 0.3)
    with pytest.raises(UnfinishedError, match=r"it said nothing for 0\.3 s"):
        found(tmp_path, "sleep 60")


def test_it_has_a_time_limit(tmp_path):
    with pytest.raises(OutOfTimeError):
        found(tmp_path, "sleep 60", seconds=0.3)


def test_it_is_found_on_the_path_or_in_a_toolkit(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitizer, "PLACES", f"{tmp_path}/cuda*/compute-sanitizer")
    assert find_sanitizer() is None
    for version in ("cuda-12", "cuda-13"):
        (tmp_path / version).mkdir()
        newest = executable(tmp_path / version / "compute-sanitizer", "")
    assert find_sanitizer() == str(newest)
    first = executable(tmp_path / "compute-sanitizer", "")
    assert find_sanitizer() == str(first)
