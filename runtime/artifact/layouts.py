"""How packed matrices lie in an artifact: the sizes that packing, kernels and checks share, and the layouts' names.

An (N, K) matrix becomes panels: P neighbouring outputs lie together for each step of K, N padded with zeros, so that a
kernel reads weights in order and turns one panel into P sums. Worked example, N = 3, K = 2, P = 2: rows
a0 a1 / b0 b1 / c0 c1 become [[a0 b0], [a1 b1]], [[c0 0], [c1 0]].

panels_32     (panels, K, 32)             a number for each output and step; also scales and zero points, with one step
                                          for each group
panels_32k2   (panels, ceil(K / 2), 32, 2) bfloat16, as uint16: two steps of an output side by side, as dot products of
                                          bfloat16 take them and as 32 bits that widen to two float32; K padded with
                                          zeros
panels_32k4   (panels, ceil(K / 4), 32, 4) int8: four steps of an output side by side, as integer dot products take
                                          them; K padded with zeros
panels_32q8   (panels, K / 8, 32)         int32: eight 4-bit numbers of an output; byte j holds step j in its lower half
                                          and step 4 + j in its upper half
...xE         E matrices, each padded by itself, stacked

On a GPU a thread loads 16 bytes at once, and 32 neighbouring threads, one for each output of a panel, load 512
consecutive bytes:

panels_32kJ   (panels, ceil(K / J), 32, J)  J steps of an output in 16 bytes: 4 of float32, 8 of float16, 16 of int8;
                                            K padded with zeros
panels_32q8k4 (panels, ceil(K / 32), 32, 4) int32: 32 steps of 4 bits in four words as above
"""

PANEL = 32  # outputs: four AVX2 registers, two AVX-512, or the lanes of a warp
PAIR = 2  # steps of bfloat16 in 32 bits
DOT = 4  # steps that an integer dot product takes together
WORD = 8  # 4-bit numbers in an int32
VECTOR = 16  # bytes that a GPU thread loads at once
WORD_ZERO = 8  # the zero point of unsigned 4-bit numbers, unless zero points are stored
ROW_MAJOR = "row_major"
