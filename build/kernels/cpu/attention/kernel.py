"""Rolling attention: split qkv, rotate, write the new columns into the ring, attend over the ring.

No copy of the cache is made. The graph keeps its cache in order of position and shifts it left at each step; here the
key of position p is in column p mod L of its slot's ring for good, L being the ring's length, so a call writes one
column (a key and a value) for each of its tokens and moves none. All columns are written before any query attends. A
query at position p sees positions p - W + 1 .. p, and a ring holds as many more columns than the window W as a call
writes, less one, so no column that is still seen is overwritten (`ModelConfig.ring_lens`).
Worked example, W = 4, L = 5, two tokens at positions 6 and 7: columns 1 and 2 receive them, after which columns
0 1 2 3 4 hold positions 5 6 7 3 4. Query 6 sees 3 4 5 6, and query 7 sees 4 5 6 7.

The sums of a query have an order of their own: the ring is divided into `SPLITS` parts, whose borders depend on nothing
but the ring, each part is summed in steps of the same columns, and then the parts are added up. Columns that a query
does not see add exactly zero. So what a token attends to gives the same bits in every function: as one row of a step,
as one of a prompt's tokens, and whatever else the call or the ring holds.

Query heads that share a key head are processed together, so that each key is loaded once for all of them. The softmax
is a running one (Milakov and Gimelshein, 2018; Dao et al., 2022): keys arrive in steps, and the values mixed so far
are scaled down whenever a larger score appears. A step is two products, whose sums stay in registers: scores = q K^T
and out += shares V, where the shares are softmax weights. Rings lie so that no sum runs across the lanes of a register
(`stored_columns.py`).

Where a cache holds int8 or int4, both products are sums of whole numbers: a query is rounded to 16 bits, relative to
its largest number, and so is a share, relative to its row's largest in a step. Either is off by about 2^-16 of the
largest at most, a fraction of what a number of such a cache is off by, and the sums are exact.

Bytes per query: at least 2 * visible * n_kv_heads * head_dim * itemsize; operations:
4 * visible * n_heads * head_dim.
"""

from tvm.script import tirx as T
from tvm.tirx import PrimFunc

from build.kernels.cache_numbers import Cache, declared, unused_parameters
from build.kernels.cpu.attention.chunk import chunk
from build.kernels.cpu.attention.steps import steps
from build.kernels.cpu.attention.stored_columns import flat
from build.kernels.cpu.level import Level
from build.kernels.parameters import without
from build.kernels.shapes import RollingAttention


def rolling_attention(level: Level, shape: RollingAttention) -> PrimFunc:
    """Kernel from qkv, the rotary cosines and sines, positions, slots and both rings to the attention's output.

    Arguments: qkv (B, T, qkv_dim), cos and sin (B, 1, T, head_dim / 2), positions (B, T), the slot of each row (B,),
    key ring, value ring and, for int8 and int4, both rings of scales, then for int4 both of minima. All rings are
    updated in place. The output (B, T, n_heads * head_dim) is a new tensor, which comes before the rings in the
    results. Either B or T is 1. The tokens of a row have consecutive positions, and those of -1 may follow, which are
    neither written nor seen.
    """
    B, N, H, D = shape.rows, shape.tokens, shape.n_heads, shape.head_dim
    body, ring = (steps if N == 1 else chunk)(level, shape), declared(shape)

    @T.prim_func
    def kernel(
        qkv: T.Buffer((B, N, shape.qkv_dim), "float32"),
        cos: T.Buffer((B, 1, N, D // 2), "float32"),
        sin: T.Buffer((B, 1, N, D // 2), "float32"),
        positions: T.Buffer((B, N), "int64"),
        slots: T.Buffer((B,), "int64"),
        keys: T.Buffer(ring.numbers.shape, ring.numbers.dtype),
        values: T.Buffer(ring.numbers.shape, ring.numbers.dtype),
        key_scales: T.Buffer(ring.scales.shape, ring.scales.dtype),
        value_scales: T.Buffer(ring.scales.shape, ring.scales.dtype),
        key_minima: T.Buffer(ring.minima.shape, ring.minima.dtype),
        value_minima: T.Buffer(ring.minima.shape, ring.minima.dtype),
        out: T.Buffer((B, N, H * D), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "op_pattern": 8})
        body(
            qkv,
            cos,
            sin,
            positions,
            slots,
            flat(shape, Cache(keys, key_scales, key_minima)),
            flat(shape, Cache(values, value_scales, value_minima)),
            out,
        )

    return without(kernel, unused_parameters(shape))
