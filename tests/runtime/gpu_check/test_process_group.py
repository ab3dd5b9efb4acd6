"""Commands with a time limit: what is told of them, and that nothing is left of them."""

import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from export.stage import ROOT
from runtime.gpu_check import process_group
from runtime.gpu_check.process_group import OutOfTimeError, UnfinishedError, run_group
from tests.helpers.processes import assert_gone

LONG = 60  # seconds that no test waits for
PAIR = f"sleep {LONG} & echo $$ $!; "  # starts another process, and says the numbers of both


def run(script, told, seconds=LONG, silence=LONG):
    run_group(["sh", "-c", script], told.append, seconds=seconds, silence=silence)


def pids(told):
    return map(int, told[0].split())


def test_each_line_is_told():
    for end in ("three\\n", "no end of a line"):
        told = []
        run(f"echo one; echo two >&2; printf '{end}'", told)
        assert told == ["one", "two", end.removesuffix("\\n")]


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("exit 3", "it ended with status 3"),
        ("echo why; echo; echo '{}'; exit 3", "it ended with status 3: why"),
        ("kill -SEGV $$", "it ended with status 139"),
        ("echo 'error: no GPU; buy one'; exit 2", "no GPU; buy one"),
    ],
)
def test_a_failure_has_its_reason(script, reason):
    with pytest.raises(UnfinishedError) as raised:
        run(script, [])
    assert str(raised.value) == reason


def test_nothing_is_left_of_a_command_that_ends():
    told = []
    run(PAIR, told)
    assert_gone(pids(told))


@pytest.mark.parametrize("script", [f"sleep {LONG}", "while true; do echo; done"])
def test_nothing_is_left_when_the_time_is_up(script, monkeypatch):
    """Which it is by a clock that jumps when something is told, so that it never is before."""
    told = []
    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 2 * LONG * bool(told))
    monkeypatch.setattr(process_group, "time", clock)
    with pytest.raises(OutOfTimeError):
        run(PAIR + script, told)
    assert_gone(pids(told))


def test_nothing_is_left_of_what_says_nothing():
    told = []
    with pytest.raises(UnfinishedError, match="it said nothing for 2 s"):
        run(PAIR + f"sleep {LONG}", told, silence=2)
    assert_gone(pids(told))


def test_nothing_is_left_when_the_caller_fails():
    seen = []

    def told(line):
        seen.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_group(["sh", "-c", PAIR + f"sleep {LONG}"], told, seconds=LONG)
    assert_gone(pids(seen))


def test_nothing_is_left_when_the_caller_is_killed():
    code = (
        "from runtime.gpu_check.process_group import run_group; "
        f"run_group({['sh', '-c', PAIR + 'wait']}, print, seconds={LONG})"
    )
    with subprocess.Popen([sys.executable, "-u", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True) as caller:
        told = [caller.stdout.readline()]
        caller.kill()
    assert_gone(pids(told))
