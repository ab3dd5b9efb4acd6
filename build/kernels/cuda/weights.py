"""Reading packed weights on a GPU: 16 bytes per thread at once, 512 adjacent bytes per warp.

The layouts are panels_32kJ of `runtime.artifact.layouts`. int4 numbers q stand for (q - zero) * scale, with one scale
and one zero point per group. Converting costs more than multiplying, so a dot product takes q as the float32
1 + q / 16, which is q's four bits at the front of the mantissa of 1, and corrects the sum: the sum of (q - zero) x is
16 * (the sum of (1 + q / 16) x) - (16 + zero) * (the sum of x).
"""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.parameters import UNUSED
from export.weights.format import MatrixLayout, Storage
from export.weights.table import format_of, vector_steps
from runtime.artifact.layouts import DOT, WORD, WORD_ZERO

ONE, TOP_BITS = 0x3F800000, 19  # bits of float32 1; where the first four bits of a mantissa begin


def scales_buffer(layout: MatrixLayout) -> Any:
    """The parameter for scales, which will be dropped where there are none."""
    size, dtype = layout.scales or (UNUSED, "float32")
    return T.Buffer(size, dtype)


def zeros_buffer(layout: MatrixLayout) -> Any:
    """The parameter for zero points, which will be dropped where there are none."""
    size, dtype = layout.offsets or (UNUSED, "uint8")
    return T.Buffer(size, dtype)


def unused(layout: MatrixLayout) -> list[str]:
    """Names among the parameters s and z of a kernel that a layout does not use."""
    return [name for name, part in (("s", layout.scales), ("z", layout.offsets)) if part is None]


Reader = Callable[[Any, Any, Any], Any]


def number(stored: Storage) -> Reader:
    """`read(loaded, start, v)`: step v of the vector at loaded[start :] as float32; int4 as 0 to 15."""

    def word(loaded: Any, start: Any, v: Any) -> Any:
        return T.Cast("float32", _bits(loaded, start, v))

    def plain(loaded: Any, start: Any, v: Any) -> Any:
        return T.Cast("float32", loaded[start + v])

    return word if format_of(stored).words else plain


def _bits(loaded: Any, start: Any, v: Any) -> Any:
    """Step v of four words: byte j of a word holds step j in its lower half and step 4 + j in its upper half."""
    return (loaded[start + v // WORD] >> (8 * (v % DOT) + 4 * (v % WORD // DOT))) & 15


def factor(stored: Storage) -> Reader:
    """Like `number`, but with an int4 number q as 1 + q / 16."""

    def in_mantissa(loaded: Any, start: Any, v: Any) -> Any:
        return T.reinterpret("float32", (_bits(loaded, start, v) << TOP_BITS) | ONE)

    return in_mantissa if format_of(stored).words else number(stored)


def group_of(stored: Storage, vector: Any) -> Any:
    """The group that a vector of int4 belongs to."""
    assert stored.group_size is not None
    return vector * vector_steps(stored) // stored.group_size


def zero_of(stored: Storage, z: Any, p: Any, g: Any, lane: Any) -> Any:
    """The zero point of a group, as float32."""
    return T.Cast("float32", z[p, g, lane]) if stored.zero_points else T.float32(WORD_ZERO)


def scale_of(s: Any, p: Any, g: Any, lane: Any) -> Any:
    """The scale of a group, as float32."""
    return T.Cast("float32", s[p, g, lane])
