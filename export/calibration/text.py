"""The calibration text: what is left of a fixed text, or a file of the user's that shares nothing with the evaluation.

A file whose name ends with `.jsonl`, `.ndjson` or `.json` holds JSON lines, each an object with a `text`; any other
file is one text.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

from export.calibration.fixed_text import FIXED_TEXTS, OPTICKS, Text
from export.checkpoints.json_files import read_text
from runtime.errors import UserError

JSON_LINES = frozenset({".jsonl", ".ndjson", ".json"})
MAX_BYTES = 16 * 2**20  # of a file, of which calibration reads a few thousand tokens
BETWEEN = "\n\n"  # the texts of JSON lines
# So many words in a row, whatever their case and the punctuation between them, are the same passage: by this length
# Brown et al., 2020, "Language Models are Few-Shot Learners", appendix C, tell a text that a model was trained on from
# one that it was not. A shorter run can be a phrase or a quotation.
SHARED_WORDS = 13
WORD = re.compile(r"\w+")


def open_text(path: Path | None) -> Text:
    """The text to calibrate on: what is left of the fixed text if there is no path.

    Raises `UserError` for a file that cannot be read, is too long, is no text in UTF-8, has a line without a text, or
    shares a passage with a text that quality is measured on.
    """
    if path is None:
        return OPTICKS.rest()
    content = _content(path)
    _check_apart(content, path)
    return Text(str(path), content)


def _content(path: Path) -> str:
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise UserError(
            f"quantize.calibration: {path} has {path.stat().st_size} bytes, expected at most {MAX_BYTES}, of which a "
            "few thousand tokens are read; name an extract"
        )
    content = read_text(path)
    return BETWEEN.join(_texts(content, path)) if path.suffix.lower() in JSON_LINES else content


def _texts(content: str, path: Path) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        where = f"quantize.calibration: {path}, line {number}"
        try:
            value = json.loads(line)
            json.dumps(value, ensure_ascii=False).encode()  # refuses a lone surrogate
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not valid JSON: {error}; write one object on each line") from error
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            raise UserError(f'{where} is no object with a text, expected {{"text": "..."}}; write one on each line')
        yield text


def _check_apart(content: str, path: Path) -> None:
    """Raise `UserError` if a run of `SHARED_WORDS` words of the content is in a text that quality is measured on.

    Figures on a text that the weights were fitted to would promise more than the model gives on others.
    """
    evaluated = {run: text.name for text in (fixed.open() for fixed in FIXED_TEXTS) for run, _ in _runs(text.content)}
    for run, start in _runs(content):
        if run in evaluated:
            line = content.count("\n", 0, start) + 1
            raise UserError(
                f"quantize.calibration: {path} shares the words {' '.join(run[:6])!r} ... (text line {line}) with "
                f"{evaluated[run]}, on which quality is measured; name another text"
            )


def _runs(content: str) -> Iterator[tuple[tuple[str, ...], int]]:
    """Every run of `SHARED_WORDS` words in a row, in lower case, and the character at which it starts."""
    words = [(match[0].lower(), match.start()) for match in WORD.finditer(content)]
    for i in range(len(words) - SHARED_WORDS + 1):
        yield tuple(word for word, _ in words[i : i + SHARED_WORDS]), words[i][1]
