"""Bytes put into place one by one, each by one instruction: nvcc makes a shift and two masks of the same in C."""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda.binding import Binding

REST = 0x7654  # a selector of `__byte_perm` for the second word: number i in its digit i is byte i of eight


def placed_byte(on: Binding) -> Callable[[Any, Any, int, int], Any]:
    """Function `place(word, byte, target, rest)`: `rest` with a word's byte as its byte `target`, which is 0 in it."""

    def serially(word: Any, byte: Any, target: int, rest: int) -> Any:
        found = (word >> T.Cast("uint32", byte * 8)) & T.uint32(0xFF)
        return (found << T.uint32(8 * target)) | T.uint32(rest)

    def place(word: Any, byte: Any, target: int, rest: int) -> Any:
        selected = T.Cast("uint32", selector(byte, target))
        return T.call_pure_extern("uint32", "__byte_perm", word, T.uint32(rest), selected)

    return serially if on.serial else place


def selector(byte: Any, target: int) -> Any:
    """The selector with which `__byte_perm` (CUDA Math API, integer intrinsics) does that."""
    return REST - (REST & 0xF << 4 * target) + byte * (1 << 4 * target)
