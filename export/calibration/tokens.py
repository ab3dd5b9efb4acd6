"""Token ids of a calibration text: rows of the same length from passages that are spread evenly over the text."""

from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from export.calibration.fixed_text import Text
from export.calibration.methods import LENGTH
from export.tokenizer_process import tokenizer_output
from runtime.artifact.manifest import ModelConfig, TokenizerSpec
from runtime.errors import UserError

MODULE = "runtime.text.encode"
SECONDS = 120  # for some ten thousand tokens, which take less than one on a quiet machine
MEMORY = 8 * 2**30  # bytes of address space, most of which libraries reserve and never use
PASSAGES = 16  # from which the rows are taken, however many rows there are
LETTERS = 16  # characters taken for each token: few tokens of a vocabulary have as many
LEAST = 256  # tokens: fewer say little about a column


def calibration_rows(text: Text, rows: int, model: ModelConfig, spec: TokenizerSpec, folder: Path) -> NDArray[np.int64]:
    """At most `rows` rows of token ids (rows, length), with the tokenizer in `folder`.

    Each row begins with bos if the tokenizer adds one. Raises `UserError` for a text that is too short, that the
    tokenizer fails on, or in which it finds tokens that the model lacks.
    """
    arguments = [msgspec.json.encode(spec).decode(), str(folder), str(SECONDS), str(MEMORY)]
    length = min(LENGTH, model.context_length or LENGTH)
    given = msgspec.json.encode(passages(text.content, rows * length))
    try:
        found = msgspec.json.decode(tokenizer_output(MODULE, arguments, SECONDS, given), type=list[list[int]])
    except UserError as error:
        raise UserError(f"the tokenizer fails on the calibration text {text.name}: {error}") from error
    most = -(-rows * length // PASSAGES)
    ids = np.array([token for passage in found for token in passage[:most]], np.int64)
    if len(ids) < LEAST:
        raise UserError(
            f"the calibration text {text.name} has {len(ids)} tokens, expected at least {LEAST}; name a longer text "
            "with quantize.calibration"
        )
    if ids.max() >= model.vocab_size:
        raise UserError(
            f"the tokenizer finds the token {ids.max()} in the calibration text {text.name}, but the model has "
            f"{model.vocab_size} tokens; fetch the files of one model"
        )
    bos = [spec.bos_id] if spec.add_bos and spec.bos_id is not None else []
    width = min(length - len(bos), len(ids))
    count = min(len(ids) // width, rows)
    cut = ids[: count * width].reshape(count, width)
    return np.hstack([np.full((count, len(bos)), bos, np.int64), cut])


def passages(content: str, tokens: int) -> list[str]:
    """Passages from which so many tokens can be taken in all; each begins with a word."""
    step, taken = -(-len(content) // PASSAGES), -(-tokens * LETTERS // PASSAGES)
    pieces = [content[start : start + min(step, taken)] for start in range(0, len(content), step)] if step else []
    return [pieces[0], *(piece.partition(" ")[2] for piece in pieces[1:])] if pieces else []
