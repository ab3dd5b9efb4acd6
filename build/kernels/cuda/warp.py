"""Exchanges among the lanes of a warp."""

from tvm.script import tirx as T

from build.kernels.cuda.binding import WARP, Binding
from build.kernels.cuda.mma import ALL_LANES

DISTANCES = (16, 8, 4, 2, 1)


def warp_maximum(on: Binding):
    """Inline `reduce(source, result, t)`: each lane's number in `result` is its warp's largest in `source`."""

    @T.inline
    def reduce(source, result, _t):
        result[0, 0] = source[0, 0]
        for i in T.unroll(len(DISTANCES)):
            result[0, 0] = T.max(
                result[0, 0],
                T.tvm_warp_shuffle_xor(ALL_LANES, result[0, 0], WARP // 2 // T.shift_left(1, i), WARP, WARP),
            )

    @T.inline
    def reduce_serially(source, result, t):
        result[t, 0] = source[t // WARP * WARP, 0]
        for lane in T.serial(1, WARP):
            result[t, 0] = T.max(result[t, 0], source[t // WARP * WARP + lane, 0])

    return reduce_serially if on.serial else reduce
