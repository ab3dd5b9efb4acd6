"""Measurements in processes of their own, each of which has ended before the next one starts (thread pools spin)."""

import os
import subprocess
from collections.abc import Mapping, Sequence

from runtime.errors import UserError


def json_of(command: Sequence[str], what: str, environment: Mapping[str, str] | None = None) -> bytes:
    """Run a command to its end; returns the last line that it prints. Raises `UserError` if it fails."""
    variables = {**os.environ, "TQDM_DISABLE": "1", **(environment or {})}
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, env=variables)
    if done.returncode:
        raise UserError(f"measuring {what} ended with status {done.returncode}; its own message is above")
    return done.stdout.splitlines()[-1]
