"""Runs a checkpoint's tokenizer in a process of its own with limits: its files may be broken, endless or greedy."""

import os
import subprocess
import sys
from collections.abc import Sequence

from export.stage import ROOT
from runtime.errors import UserError


def tokenizer_output(module: str, arguments: Sequence[str], seconds: int, given: bytes = b"") -> bytes:
    """The standard output of a module of the runtime, `given` its standard input.

    Raises `UserError` with the reason alone, such as "it takes longer than 60 seconds", unless the module succeeds.
    """
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            env=os.environ | {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false"},
            input=given,
            capture_output=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(f"it takes longer than {seconds} seconds") from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        said = [line for line in lines if line.startswith("error: ")]
        ended = f"it ended with status {done.returncode}, by a fault of the library or for want of memory"
        raise UserError(said[-1].removeprefix("error: ") if said else ended)
    return done.stdout
