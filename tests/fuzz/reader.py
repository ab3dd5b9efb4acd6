"""What is fuzzed: a reader, its valid inputs, how they are spoiled, and what a right answer is.

Each module in `tests/fuzz/readers/` has a function `open_reader(folder)`; the module's name is the reader's. To fuzz
another reader, add a module.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

ROOM = Path(__file__).parent


class WrongResult(Exception):
    """An input was accepted, but what was made of it is wrong; the text says what, without numbers or names."""


@dataclass(frozen=True)
class Reader:
    """A reader of one kind of file."""

    seeds: Sequence[bytes]  # valid inputs
    spoil: Callable[[Random, bytes], bytes]
    # Reads an input and checks what was read. It returns if the input was accepted and read rightly, and raises
    # `UserError` if it was refused. Anything else that it raises is a finding.
    check: Callable[[bytes], None]
    known: Mapping[str, bytes] = field(default_factory=dict)  # inputs that got through once, by what is wrong with them

    def input_of(self, case: str) -> bytes:
        """The input of a case: the name of a known one, or a number, which determines the input."""
        if case in self.known:
            return self.known[case]
        draw = Random(int(case))
        return self.spoil(draw, draw.choice(self.seeds))


def names() -> list[str]:
    """All readers."""
    return sorted(path.stem for path in (ROOM / "readers").glob("*.py"))


def open_reader(name: str, folder: Path) -> Reader:
    """The reader of a name, with its files in a folder of their own. Its libraries are loaded only now."""
    own = folder / name
    own.mkdir()
    return importlib.import_module(f"tests.fuzz.readers.{name}").open_reader(own)


def place(path: Path, data: bytes) -> Path:
    """Write a new file; an older one of this name may still be mapped, so it is not written over."""
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


def demand(right: bool, what: str) -> None:
    """Raise `WrongResult` unless an accepted input was read rightly."""
    if not right:
        raise WrongResult(what)
