"""How a command ends when the system, or another library, refuses something."""

import os
import subprocess
import sys

import pytest

from export.stage import ROOT
from runtime.errors import REASON_LENGTH, UserError, refusing


def command(body, **options):
    """A process that runs `body` as a command's main."""
    code = f"from runtime.errors import *\ndef main():\n    {body}\n    return 0\nrun_command(main)"
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60, check=False, **options
    )


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        ("open('/proc/version/x', 'w')", "/proc/version/x: Not a directory; choose another place"),
        ("open('/', 'w')", "/: Is a directory; choose another place"),
        ("open('x' * 999, 'w')", f"{'x' * 999}: File name too long; choose a shorter name"),
        ("raise MemoryError", "there is not enough memory; free some, or choose something smaller"),
        ("raise UserError('no')", "no"),
    ],
)
def test_what_the_system_refuses_is_one_sentence(body, sentence):
    done = command(body, stdout=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (2, f"error: {sentence}\n")


@pytest.mark.parametrize("text", ["'x'", "'x' * 10**6"])
def test_a_full_disk_under_standard_output(text):
    with open("/dev/full", "w") as full:
        done = command(f"print({text})", stdout=full)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device; free some space on that disk\n")


def test_a_closed_standard_output():
    done = command("import export.console; print('x')", preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (
        2,
        "error: standard output is closed; send it to a file or a terminal\n",
    )


def test_a_closed_standard_error_does_not_matter():
    code = (
        "from export.console import console; from runtime.errors import run_command; console.print('x'); "
        "run_command(lambda: print('y') or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, preexec_fn=lambda: os.close(2), check=False
    )
    assert (done.returncode, done.stdout) == (0, b"y\n")


def test_our_own_mistakes_are_no_user_errors():
    done = command("raise OSError(999, 'x')", stdout=subprocess.DEVNULL)
    assert done.returncode == 1
    assert "Traceback" in done.stderr


class PanicException(BaseException):
    """As in the Python bindings of Rust code."""


@pytest.mark.parametrize("error", [ValueError("a\n b"), PanicException("a b")])
def test_a_librarys_failure_is_one_sentence(error):
    with (
        pytest.raises(UserError, match=r"^x does not load: a b; fetch it again$"),
        refusing("x does not load", "fetch it again"),
    ):
        raise error


def test_a_long_reason_is_cut():
    with pytest.raises(UserError) as told, refusing("x", "y"):
        raise ValueError("z" * 10_000)
    assert len(str(told.value)) < REASON_LENGTH + 20


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, UserError("mine")])
def test_other_ends_pass(error):
    with pytest.raises(error if isinstance(error, type) else UserError, match=None), refusing("x", "y"):
        raise error
