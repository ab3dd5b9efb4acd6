"""Turns: the order in which several things are measured, so that none always follows the same one."""

from collections.abc import Sequence
from typing import TypeVar

Item = TypeVar("Item")


def rotated(items: Sequence[Item], turn: int) -> list[Item]:
    """The items in their order, from another one on in each turn."""
    first = turn % len(items)
    return [*items[first:], *items[:first]]
