"""Opens a checkpoint's tokenizer.json once for the ids that a tokenizer needs, and refuses what could harm a box."""

import json
from math import prod
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from runtime.errors import UserError, refusing

MOST_GROWTH = 64  # times that a tokenizer may make a text longer before it splits it
MOST_ADDED = 1024  # tokens that a tokenizer may put around a text


def open_tokenizer_json(data: bytes, path: Path) -> Tokenizer:
    """The tokenizer in `data`, whose file is `path`, without padding and truncation; raises `UserError` if it is none.

    A normalizer or decoder that makes a text many times longer is refused, and so is a post-processor that adds many
    tokens: the library takes all the memory for it.
    """
    with refusing(f"{path} is not a tokenizer", "fetch the checkpoint again"):
        tokenizer = Tokenizer.from_buffer(data)
        tokenizer.no_padding()  # the file may ask for a text of any length
        tokenizer.no_truncation()
        file = json.loads(data)
        growths = {part: _growth(file.get(part)) for part in ("normalizer", "decoder")}
        added = _added(file.get("post_processor"))
    for part, growth in growths.items():
        if growth > MOST_GROWTH:
            raise UserError(
                f"{path}: its {part} can make a text {growth} times as long, expected at most {MOST_GROWTH} times; "
                "use the tokenizer that the model was published with"
            )
    if added > MOST_ADDED:
        raise UserError(
            f"{path}: its post_processor puts {added} tokens around a text, expected at most {MOST_ADDED}; "
            "use the tokenizer that the model was published with"
        )
    return tokenizer


def _added(part: Any) -> int:  # noqa: ANN401 (JSON that the library has accepted)
    """The most tokens that a post-processor may add: each piece of a template may stand for many ids."""
    if not isinstance(part, dict):
        return 0
    pieces = max(len(part.get("single") or ()), len(part.get("pair") or ()))
    ids = max((len(token["ids"]) for token in (part.get("special_tokens") or {}).values()), default=0)
    return pieces * ids + sum(map(_added, part.get("processors") or ()))


def _growth(part: Any) -> int:  # noqa: ANN401 (JSON that the library has accepted)
    """How many times as long a text may become: each replacement may put its text in place of one character."""
    if not isinstance(part, dict):
        return 1
    inner = [_growth(item) for name in ("normalizers", "decoders") for item in part.get(name) or ()]
    replacement = part.get("content") if part.get("type") == "Replace" else part.get("prepend")
    own = len(replacement) if isinstance(replacement, str) else 1
    return max(own, 1) * prod(inner)


def tokens_around(tokenizer: Tokenizer, path: Path) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the post-processor of an opened tokenizer, whose file is `path`, puts before and after a text."""
    with refusing(f"{path} cannot encode the text 'a'", "use the tokenizer that the model was published with"):
        encoding = tokenizer.encode("a")
    inside = [i for i, sequence in enumerate(encoding.sequence_ids) if sequence is not None]
    first, end = (inside[0], inside[-1] + 1) if inside else (len(encoding.ids), len(encoding.ids))
    return tuple(encoding.ids[:first]), tuple(encoding.ids[end:])


def added_names_in(data: bytes, path: Path) -> tuple[str, ...]:
    """Names of the tokens that were added to the vocabulary in `data`, special ones among them, by id.

    Raises `UserError` like `open_tokenizer_json`.
    """
    added = open_tokenizer_json(data, path).get_added_tokens_decoder()
    return tuple(added[token_id].content for token_id in sorted(added))
