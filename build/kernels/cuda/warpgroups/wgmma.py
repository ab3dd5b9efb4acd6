"""`wgmma` of sm_90a: the product that the 128 threads of a warpgroup compute on tensor cores, while they go on.

64 x 16 numbers of a times 16 x N of b, both float16, are added to 64 x N float32 sums. Each warp has 16 rows of a in
its registers, as `mma.sync` has them (`mma.py`), and the sums of those rows. b is in shared memory, as "core matrices":
8 neighbours along N, of 16 bytes along the depth each (PTX manual, "Asynchronous Warpgroup Level Matrix
Multiply-Accumulate Operation").

The registers of a product that goes on, a and the sums, may not be touched.
"""

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from build.kernels.cuda import mma
from build.kernels.cuda.binding import WARP
from build.kernels.cuda.mma import QUAD

ROWS = 64
THREAD_ROWS = 2  # rows whose sums a thread holds
WARPGROUP = 4 * WARP  # threads
COLUMN_STEP, MOST_COLUMNS = 8, 256  # N is a multiple of the first
CORE_ROWS = 8  # of a core matrix
CORE_BYTES = 16  # of each of its rows


def sums(columns: int) -> int:
    """Sums that a thread holds of 64 x `columns`."""
    return ROWS * columns // WARPGROUP


def column(t: Any, piece: Any, i: Any) -> Any:
    """Column of a thread's sum i of 2 in a piece of 8 columns."""
    return piece * COLUMN_STEP + t % QUAD * 2 + i


def place(piece: Any, r: Any, i: Any) -> Any:
    """Index of that sum in row r of the thread's two, which are those of `mma.fragment_row`."""
    return (piece * THREAD_ROWS + r) * 2 + i


def factor(address: Any, columns: int) -> Any:
    """Descriptor of 16 x `columns` numbers of b from an address in shared memory on.

    Core matrices that are neighbours along N lie next to each other, and those that are neighbours along the depth lie
    `columns` rows apart (PTX manual, "Matrix Descriptor Format"; without a swizzle).
    """
    along_depth, along_columns = columns * CORE_BYTES, CORE_ROWS * CORE_BYTES
    constant = (along_depth // 16) << 16 | (along_columns // 16) << 32
    return T.Cast("uint64", (address >> T.uint32(4)) & T.uint32(0x3FFF)) | T.uint64(constant)


def multiplier(columns: int) -> Callable[..., Any]:
    """Inline `multiply(acc, a, at, b)`: start to add a[at : at + 4] times the b of a descriptor to acc."""
    instruction = T.ptx[f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16"]

    @T.inline
    def multiply(acc, a, at, b):
        T.evaluate(
            instruction(
                *[acc[0, i] for i in range(sums(columns))], *[a[0, at + i] for i in range(mma.A)], b, True, 1, 1, 0
            )
        )

    return multiply


@T.inline
def begin():
    """What was written to registers before is there for the products behind it."""
    T.evaluate(T.ptx["wgmma.fence.sync.aligned"]())


@T.inline
def close():
    """Make a group of the products that were started since the last one."""
    T.evaluate(T.ptx["wgmma.commit_group.sync.aligned"]())


@T.inline
def wait(open_groups):
    """Wait until all but the latest `open_groups` groups are done."""
    T.evaluate(T.ptx["wgmma.wait_group.sync.aligned"](open_groups))
