"""An artifact's build number, by which a box refuses one that is older than it has had before.

`make ship BUILD=17` puts the number into the manifest, so that the signature covers it: whoever can replace an artifact
by an old one, signed when its faults were not known yet, cannot make it look new. It needs Python's standard library
alone, as the doctor does.
"""

import argparse
import os
from pathlib import Path

from runtime.errors import UserError

MINIMUM_VARIABLE = "RUNTIME_MINIMUM_BUILD"  # environment variable: the smallest build number that commands accept
FLAG = "--minimum-build"
LARGEST = 2**53  # that every reader of JSON holds exactly


def build_number(text: str, where: str) -> int:
    """Read a build number; raises `UserError`, with `where` it was found, for anything else."""
    if not (text.isascii() and text.isdigit() and len(text) <= len(str(LARGEST)) and int(text) <= LARGEST):
        raise UserError(f"{where} is {text!r}, expected a whole number from 0 to {LARGEST}")
    return int(text)


def add_minimum_build(parser: argparse.ArgumentParser) -> None:
    """Add the flag that every command takes which opens an artifact."""
    parser.add_argument(
        FLAG,
        type=lambda text: build_number(text, FLAG),
        default=0,
        metavar="N",
        help=f"refuse an artifact with a smaller build number (default: ${MINIMUM_VARIABLE}, if set)",
    )


def required_build(asked: int = 0) -> int:
    """The smallest build number to accept: the larger of what was `asked` for and what this environment requires.

    Raises `UserError` if the variable holds no number.
    """
    text = os.environ.get(MINIMUM_VARIABLE)
    return asked if text is None else max(asked, build_number(text, MINIMUM_VARIABLE))


def check_build_number(folder: Path, found: int, minimum: int) -> None:
    """Raise `UserError` for an artifact that is older than the `minimum`."""
    if found < minimum:
        raise UserError(
            f"{folder} has build number {found}, but {minimum} or newer is required ({FLAG} or {MINIMUM_VARIABLE}); "
            "get the newest artifact from its maker"
        )
