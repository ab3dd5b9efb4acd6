"""The texts that come with pinned packages, so that everybody calibrates and measures on the same bytes.

No passage serves both: quality is measured on the beginning of a text, and calibration reads what is left of the first.
"""

import hashlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError

LENGTH = 1024  # most tokens that quality predicts in each row of a text
SHORT = 512  # in each row of the second text, which takes half of the time


@dataclass(frozen=True)
class Text:
    """A text, what messages and tables call it, and the most tokens that quality predicts in each of its rows."""

    name: str
    content: str
    length: int = LENGTH


@dataclass(frozen=True)
class FixedText:
    """A text file inside a pinned package, known by its SHA-256; it counts from `start` on."""

    name: str
    package: str
    member: str
    sha256: str
    start: str  # what comes before is front matter
    length: int = LENGTH  # as in `Text`
    evaluated: float = 1.0  # the share of the text, from its start, that quality is measured on

    def open(self) -> Text:
        """The part that quality is measured on; raises `UserError` if the file is not the expected one."""
        whole = self._read()
        return Text(self.name, whole[: self._cut(whole)], self.length)

    def rest(self) -> Text:
        """The part that quality never reads; raises `UserError` like `open`."""
        whole = self._read()
        return Text(self.name, whole[self._cut(whole) :], self.length)

    def _cut(self, whole: str) -> int:
        """Where the rest begins: with a paragraph."""
        return len(whole) if self.evaluated == 1 else whole.index("\n\n", int(len(whole) * self.evaluated)) + 2

    def _read(self) -> str:
        spec = importlib.util.find_spec(self.package)
        path = Path(spec.origin).parent / self.member if spec and spec.origin else Path(self.package) / self.member
        data = path.read_bytes() if path.is_file() else b""
        if hashlib.sha256(data).hexdigest() != self.sha256:
            raise UserError(
                f"{path} is not the text that quality is measured on; "
                "install the pinned packages again with `make setup`"
            )
        whole = data.decode("utf-8").replace("\r\n", "\n")
        return whole[whole.index(self.start) :]


# Newton's Opticks (4th edition, 1730, Project Gutenberg) is test data of apache-tvm-ffi; the other is Python source.
OPTICKS = FixedText(
    "English of 1730 (Newton's Opticks)",
    "tvm_ffi",
    "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt",
    "d4a9ac22462b35e7821a4f2706c211093da678620a8f9997989ee7cf8d507bbd",
    "DEFIN. I.",
    evaluated=0.5,
)
PYTHON_SOURCE = FixedText(
    "Python source (jinja2/compiler.py)",
    "jinja2",
    "compiler.py",
    "f51a42425e57f3c0479652623ec1cf876f791e1d2e029bf0149350baeb542de3",
    "import typing as t",
    SHORT,
)
FIXED_TEXTS = (OPTICKS, PYTHON_SOURCE)  # that quality is measured on
