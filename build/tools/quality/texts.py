"""The texts that quality is measured on, and the passages that they are cut into.

Two texts of different kinds come with pinned packages, so that everybody measures on the same bytes. A file of the
user's own takes their place.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from build.tools.quality.figures import LEAST_TOKENS
from export.calibration.fixed_text import FIXED_TEXTS, Text
from export.checkpoints.json_files import read_text
from runtime.errors import UserError
from runtime.text.tokenizer import TEXT_LIMIT, Tokenizer

ROWS = 8  # side by side: 8192 tokens are predicted in all
BYTES_LIMIT = TEXT_LIMIT  # of a file: a text of so many bytes has at most as many characters
LEAST_CONTEXT = 4  # tokens of a chunk: a smaller one has next to nothing to score behind its first half


@dataclass(frozen=True)
class Passages:
    """Token ids (n, length) of passages, each read from empty caches.

    The first `unscored` + 1 ids of each are context alone; every later one is predicted and scored.
    """

    ids: NDArray[np.int64]
    unscored: int
    scored_bytes: int  # of the text of all scored tokens, in UTF-8

    @property
    def scored(self) -> int:
        """The number of tokens that are scored, in all passages."""
        return len(self.ids) * (self.ids.shape[1] - 1 - self.unscored)


def open_texts(path: Path | None) -> list[Text]:
    """The fixed texts, or the one in a file; raises `UserError` if it cannot be read or is too long."""
    if path is None:
        return [fixed.open() for fixed in FIXED_TEXTS]
    if path.is_file() and path.stat().st_size > BYTES_LIMIT:
        raise UserError(f"{path} has {path.stat().st_size} bytes, expected at most {BYTES_LIMIT}; cut it")
    return [Text(str(path), read_text(path))]


def whole_rows(text: Text, tokenizer: Tokenizer, rows: int, slots: int) -> Passages:
    """A text's beginning as `rows` passages, for caches of `slots`; all ids but the first of each are scored.

    Each row continues where the previous one ends, whose last id it repeats as its first. Raises `UserError` for a text
    that is too short for statistics.
    """
    ids = tokenizer.encode(text.content)
    _check_length(text, len(ids), rows * -(-LEAST_TOKENS // rows) + 1)
    length = min(text.length, slots, (len(ids) - 1) // rows)
    passages = np.stack([ids[row * length : (row + 1) * length + 1] for row in range(rows)])
    return Passages(passages, 0, _text_bytes(tokenizer, passages, 0))


def check_chunks(context: int | None, most: int | None) -> None:
    """Raise `UserError` for a length or a number of chunks by which too few tokens would be scored."""
    if context is None:
        if most is not None:
            raise UserError("--chunks limits the chunks that --context makes: pass --context with it")
        return
    if context < LEAST_CONTEXT:
        raise UserError(f"--context is {context}, expected at least {LEAST_CONTEXT} tokens")
    if most is not None and most < _least_chunks(context):
        raise UserError(
            f"--chunks is {most}, expected at least {_least_chunks(context)} of {context} tokens, "
            f"so that {LEAST_TOKENS} are scored"
        )


def chunks(text: Text, tokenizer: Tokenizer, context: int, most: int | None) -> Passages:
    """A text as chunks of `context` ids, of which only the second half is scored; what is left at the end is dropped.

    The convention of `perplexity` in llama.cpp's tools/perplexity/perplexity.cpp, by which figures on WikiText-2 with a
    context of 512 are published: bos takes the place of each chunk's first token if the vocabulary adds one, and the
    logits after the tokens context // 2 to context - 2 count. `most` limits the number of chunks. Raises `UserError`
    for a text that is too short for statistics.
    """
    ids = tokenizer.encode(text.content)
    _check_length(text, len(ids), context * _least_chunks(context))
    count = len(ids) // context if most is None else min(len(ids) // context, most)
    passages = np.array(ids[: count * context], np.int64).reshape(count, context)
    unscored = context // 2
    scored_bytes = _text_bytes(tokenizer, passages, unscored)
    bos_id = tokenizer.spec.bos_id if tokenizer.spec.add_bos else None
    if bos_id is not None:
        passages[:, 0] = bos_id
    return Passages(passages, unscored, scored_bytes)


def _least_chunks(context: int) -> int:
    return -(-LEAST_TOKENS // (context - 1 - context // 2))


def _check_length(text: Text, found: int, least: int) -> None:
    if found < least:
        raise UserError(
            f"{text.name} has {found} tokens, expected at least {least}, so that {LEAST_TOKENS} are scored; "
            "name a longer text"
        )


def _text_bytes(tokenizer: Tokenizer, passages: NDArray[np.int64], unscored: int) -> int:
    """The bytes of the scored tokens' text in UTF-8; a character that a passage cuts counts as U+FFFD."""
    total = 0
    for row in passages.tolist():
        stream = tokenizer.stream(row[: unscored + 1])
        pieces = [stream.push(token_id) for token_id in row[unscored + 1 :]]
        total += len(("".join(pieces) + stream.flush()).encode())
    return total
