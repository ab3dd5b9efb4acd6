"""The hyperparameters of a GGUF that may be lists with an entry for each layer."""

import reprlib
from collections.abc import Mapping

from runtime.errors import UserError

UNIFORM = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")  # here the same for every layer
WINDOW, PATTERN, LAYERS = "attention.sliding_window", "attention.sliding_window_pattern", "block_count"


def of_layers(values: Mapping[str, object], where: str) -> dict[str, object]:
    """The values, whose keys have lost the architecture's prefix, with lists as our fields expect them.

    A window becomes a list where only some layers have it, and none where it is 0, as llama.cpp reads it. Raises
    `UserError` for a number that differs by layer.
    """
    uniform = {key: _one_of(key, values[key], where) for key in UNIFORM if isinstance(values.get(key), list)}
    return {**values, **uniform, WINDOW: _windows(values, where)}


def _one_of(key: str, numbers: object, where: str) -> object:
    assert isinstance(numbers, list)
    if not numbers or any(number != numbers[0] for number in numbers):
        raise UserError(
            f"{where} has {key}: {reprlib.repr(numbers)}, which differs by layer and is not supported; "
            "expected the same number for every layer"
        )
    return numbers[0]


def _windows(values: Mapping[str, object], where: str) -> object:
    """One window, none, or a list with the window of each layer."""
    window, pattern, n_layers = values.get(WINDOW) or None, values.get(PATTERN), values.get(LAYERS)
    if window is None or pattern is None or not isinstance(n_layers, int):
        return window
    if isinstance(pattern, list):
        return [window if has_window else None for has_window in pattern]
    if isinstance(pattern, int) and 0 <= pattern <= n_layers:
        return [None if pattern and layer % pattern == pattern - 1 else window for layer in range(n_layers)]
    raise UserError(
        f"{where} has {PATTERN}: {reprlib.repr(pattern)}, expected a list with true for each layer that has a window, "
        "or the number of layers after which one has none"
    )
