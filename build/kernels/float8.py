"""8-bit floats (e4m3: 4 bits of exponent with a bias of 7, 3 of mantissa) by their bits, on every target."""

from tvm.ir import Expr
from tvm.script import tirx as T

E4M3_UNIT = 256  # what a float16 must be multiplied by that has the sign, exponent and mantissa of an e4m3 number
LARGEST = 0x43E00000  # the bits of 448 as float32 (Micikevicius et al. 2022, arXiv 2209.05433)
SMALLEST_NORMAL = 0x3C800000  # likewise of 2**-6, below which numbers are multiples of SMALLEST
SMALLEST = 2.0**-9
DROPPED = 20  # bits of float32's mantissa beyond e4m3's
BIAS_DIFFERENCE = (127 - 7) << 3  # between the exponents of both, above the mantissa that e4m3 keeps


def to_e4m3(x: Expr) -> Expr:
    """The bits, a uint8, of the number that is nearest to a float32, half to even; 448 stands for all that is beyond.

    So it does for what is not a number, whose bits are those of more than infinity.
    """
    bits = T.reinterpret("uint32", x)
    size = T.min(bits & T.uint32(0x7FFFFFFF), T.uint32(LARGEST))
    # Half of the last place that is kept, or a little less above an even number: it carries where that rounds up.
    half = T.uint32((1 << DROPPED - 1) - 1) + (size >> T.uint32(DROPPED) & T.uint32(1))
    normal = (size + half >> T.uint32(DROPPED)) - T.uint32(BIAS_DIFFERENCE)
    subnormal = T.Cast("uint32", T.nearbyint(T.reinterpret("float32", size) * T.float32(1 / SMALLEST)))
    sign = bits >> T.uint32(24) & T.uint32(0x80)
    return T.Cast("uint8", sign | T.Select(size < T.uint32(SMALLEST_NORMAL), subnormal, normal))


def from_e4m3(bits: Expr) -> Expr:
    """The finite number, in float32, that a uint8 holds the bits of.

    With its sign, exponent and mantissa in the places that float16 has for them, it is a float16 of 2**-8 times its
    value.
    """
    wide = T.Cast("uint16", bits)
    half = (wide & T.uint16(0x80)) << T.uint16(8) | (wide & T.uint16(0x7F)) << T.uint16(7)
    return T.Cast("float32", T.reinterpret("float16", half)) * T.float32(E4M3_UNIT)
