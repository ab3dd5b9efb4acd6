"""The emulated GPU sees what a GPU does not tell, and computes what a GPU would, in any order of threads."""

from fractions import Fraction

import numpy as np
import pytest

from tests.emulator.gpu import EmulatorError, Run
from tests.emulator.source import rewritten

CHECKED = Run("random", checked=True)
ORDERS = [
    *(Run(order, checked=checked) for order in ("forward", "reverse") for checked in (False, True)),
    *(Run("random", seed, checked=seed % 2 == 0) for seed in range(6)),
]


def source(body, parameters, threads):
    """A kernel as TVM writes one."""
    signature = f'extern "C" __global__ void __launch_bounds__({threads}) k({parameters})'
    return f"\n#include <cstdint>\n#define uint unsigned int\n{signature};\n{signature} {{\n{body}\n}}\n"


def launch(gpu_process, body, arrays, run=CHECKED, blocks=1, threads=64, bound=None, cluster=1):
    """The arrays, which are parameters a, b, ..., after a launch."""
    names = {"float32": "float", "uint32": "uint", "float16": "half", "int32": "int"}
    parameters = ", ".join(
        f"{names[str(array.dtype)]}* __restrict__ {name}" for name, array in zip("abcd", arrays, strict=False)
    )
    return gpu_process.ask("launch", source(body, parameters, bound or threads), blocks, cluster, threads, arrays, run)


A, B = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
SHARED = "__shared__ alignas(64) float s[64]; "
SHIFT = SHARED + "s[threadIdx.x] = a[threadIdx.x]; %s b[threadIdx.x] = s[(threadIdx.x + 1) & 63];"


def copies(then, distance):
    """Eight threads copy 16 bytes each to two halves of s, a group for each, and b[i] becomes s[i ^ distance]."""
    return f"""
        {SHARED}
        for (int i = threadIdx.x * 4; i < 64; i += 32)
          if (threadIdx.x < 8) {{
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :
              : "r"(__cvta_generic_to_shared(&s[i])), "l"(&a[i]) : "memory");
            asm volatile("cp.async.commit_group;" :  : );
          }}
        {then}
        if (threadIdx.x < 32) b[threadIdx.x] = s[threadIdx.x ^ {distance}];
    """


def wait(groups):
    """Wait until so many groups are left."""
    return f'asm volatile("cp.async.wait_group {groups};" :  :  : "memory");'


WRONG = {  # what the error says, by the fault and its kernel
    "no barrier": ("is a race with|nobody has written", SHIFT % ""),
    "no barrier before the next round": (
        "is a race with",
        f"{SHARED}\nfor (int i = 0; i < 2; ++i) {{\n s[threadIdx.x] = a[threadIdx.x] + i;\n __syncthreads();\n"
        " b[threadIdx.x] = s[63 - threadIdx.x];\n}",
    ),
    "two threads write one place": (
        "is a race with a write",
        SHARED + "s[0] = a[threadIdx.x]; __syncthreads(); b[threadIdx.x] = s[0];",
    ),
    "a barrier in half of the threads": (
        "at the barrier in line",
        "if (threadIdx.x < 32) __syncthreads(); b[threadIdx.x] = 0;",
    ),
    "two barriers": (
        "is at the barrier in line",
        "if (threadIdx.x < 32) { __syncthreads(); } else {\n __syncthreads(); }",
    ),
    "loops of other lengths": (
        "at the barrier in line",
        "for (int i = 0; i < (int)threadIdx.x / 32 + 1; ++i) __syncthreads();",
    ),
    "a shuffle without some lanes": (
        "waits in line",
        "float v = a[threadIdx.x]; if (threadIdx.x != 5) v = __shfl_xor_sync(0xffffffffu, v, 1, 32);",
    ),
    "a shuffle in two places": (
        "of its warp wait in line",
        "float v = a[threadIdx.x]; if (threadIdx.x & 1) {\n v = __shfl_xor_sync(0xffffffffu, v, 1, 32); } else {\n"
        " v = __shfl_xor_sync(0xffffffffu, v, 1, 32); }\n b[threadIdx.x] = v;",
    ),
    "a shuffle from outside of its mask": (
        "takes no part",
        "float v = a[threadIdx.x]; if ((threadIdx.x & 31) < 8) v = __shfl_sync(0xffu, v, 9, 32); b[threadIdx.x] = v;",
    ),
    "one float too far": (
        "outside of every allocation .offset 256 of one of 256",
        "b[threadIdx.x + 1] = a[threadIdx.x];",
    ),
    "one float before": ("outside of every allocation .offset -4", "b[threadIdx.x] = a[(int)threadIdx.x - 1];"),
    "one float behind a shared array": (
        "outside of every array",
        SHARED + "float* q = s; q[threadIdx.x + 1] = a[threadIdx.x]; __syncthreads(); b[threadIdx.x] = s[threadIdx.x];",
    ),
    "an index beyond a shared array": (
        "undefined in line 7: out_of_bounds",
        SHARED + "\ns[threadIdx.x + 1] = a[threadIdx.x]; __syncthreads(); b[threadIdx.x] = s[threadIdx.x];",
    ),
    "an index beyond a local array": (
        "out_of_bounds",
        "float s[4]; for (int i = 0; i <= (int)a[0] * 0 + 4; ++i) s[i] = a[i]; b[threadIdx.x] = s[1];",
    ),
    "a misaligned vector": ("is misaligned", "*(float2*)(b + threadIdx.x) = *(float2*)(a + 0);"),
    "shared memory that nobody has written": (
        "of shared memory that nobody has written",
        SHARED + "if (threadIdx.x) s[threadIdx.x] = 1; __syncthreads(); b[threadIdx.x] = s[threadIdx.x];",
    ),
    "shared memory of the block before": (
        "of shared memory that nobody has written",
        SHARED
        + "if (blockIdx.x == 0) s[threadIdx.x] = 1; __syncthreads(); if (blockIdx.x) a[threadIdx.x] = s[threadIdx.x];",
    ),
    "two blocks write one place": ("of another block", "b[threadIdx.x] = a[threadIdx.x] + blockIdx.x;"),
    "a block reads what another writes": (
        "of another block",
        "if (blockIdx.x == 1) b[threadIdx.x] = 1; else a[threadIdx.x] = b[threadIdx.x];",
    ),
    "no barrier for global memory": ("is a race with", "b[threadIdx.x] = 1; a[threadIdx.x] = b[63 - threadIdx.x];"),
    "an atomic beside a plain write": (
        "is a race with",
        "__shared__ alignas(64) int s[1]; if (threadIdx.x == 0) s[0] = 0; atomicAdd(&s[0], 1); __syncthreads();"
        " b[threadIdx.x] = s[0];",
    ),
    "an address of another thread": (
        "another thread's stack",
        "__shared__ alignas(64) uint64_t s[64]; float own = 1; s[threadIdx.x] = (uint64_t)&own; __syncthreads();"
        " b[threadIdx.x] = *(float*)s[63 - threadIdx.x];",
    ),
    "copies that nobody waits for": ("asynchronous copy by thread", copies("__syncthreads();", 4)),
    "copies of a later group than was waited for": (
        "asynchronous copy by thread",
        copies(wait(1) + "__syncthreads();", 36),
    ),
    "no barrier after the wait": ("is a race with|nobody has written", copies(wait(0), 4)),
}


@pytest.mark.parametrize("fault", WRONG)
def test_faults_are_seen(gpu_process, fault):
    said, body = WRONG[fault]
    blocks = 2 if "block" in fault.split() or "blocks" in fault.split() else 1
    with pytest.raises(EmulatorError, match=said):
        launch(gpu_process, body, [A, B], blocks=blocks)


def test_writes_behind_an_allocation_are_seen_without_checks(gpu_process):
    with pytest.raises(EmulatorError, match="written behind an allocation of 240 bytes"):
        launch(gpu_process, "b[threadIdx.x + 1] = a[threadIdx.x];", [A[:60], B[:60]], Run("random"), threads=60)


def test_launch_bounds_hold(gpu_process):
    with pytest.raises(EmulatorError, match="launched with 64 threads, but its launch bounds are 32"):
        launch(gpu_process, "b[threadIdx.x] = 0;", [A, B], bound=32)


def test_shared_memory_has_a_limit(gpu_process):
    with pytest.raises(EmulatorError, match="49156 bytes of shared memory, more than 49152"):
        launch(gpu_process, "__shared__ alignas(64) float s[12289]; s[0] = 1;", [A, B])


def test_without_checks_a_missing_barrier_shows_in_the_result(gpu_process):
    found = [launch(gpu_process, SHIFT % "", [A, B], Run(order))[1] for order in ("forward", "reverse", "random")]
    assert len({b.tobytes() for b in found}) == 3


def lanes_of(width):
    """First lane of each lane's segment."""
    return np.arange(64) // width * width


RIGHT = {  # what b becomes, by what the kernel has and the kernel
    "a barrier": (SHIFT % "__syncthreads();", np.roll(A, -1)),
    "atomics": (
        "__shared__ alignas(64) int s[1]; if (threadIdx.x == 0) s[0] = 0; __syncthreads();\n"
        "atomicAdd(&s[0], 2); __syncthreads(); b[threadIdx.x] = s[0];",
        np.full_like(A, 128),
    ),
    "a sum of a warp": (
        "float v = a[threadIdx.x]; for (int i = 1; i < 32; i *= 2) v = v + __shfl_xor_sync(0xffffffffu, v, i, 32);\n"
        "b[threadIdx.x] = v;",
        np.repeat(A.reshape(2, 32).sum(1), 32),
    ),
    "a shuffle down": (
        "b[threadIdx.x] = __shfl_down_sync(0xffffffffu, a[threadIdx.x], 3, 8);",
        np.where(A % 8 + 3 < 8, A + 3, A),
    ),
    "a shuffle up": (
        "b[threadIdx.x] = __shfl_up_sync(0xffffffffu, a[threadIdx.x], 2, 16);",
        np.where(A % 16 >= 2, A - 2, A),
    ),
    "a shuffle from one lane": ("b[threadIdx.x] = __shfl_sync(0xffffffffu, a[threadIdx.x], 5, 8);", lanes_of(8) + 5),
    "a vote": (
        "b[threadIdx.x] = __popc(__ballot_sync(0xffffffffu, a[threadIdx.x] < 37));",
        np.repeat([32, 5], 32),
    ),
    "max of NaN": ("b[threadIdx.x] = max(a[threadIdx.x], sqrtf(-1.0f));", A),
    "copies of one group": (
        copies(wait(1) + "__syncthreads();", 4),
        np.where(A < 32, (A.astype(int) ^ 4), 0),
    ),
    "copies of all groups": (
        copies(wait(0) + "__syncthreads();", 36),
        np.where(A < 32, (A.astype(int) ^ 36), 0),
    ),
}


@pytest.mark.parametrize("name", RIGHT)
def test_every_order_gives_what_a_gpu_does(gpu_process, name):
    body, expected = RIGHT[name]
    for run in ORDERS:
        _, b = launch(gpu_process, body, [A, B], run)
        np.testing.assert_array_equal(b, expected)


def test_blocks_run_side_by_side(gpu_process):
    body = "b[blockIdx.x * 16 + threadIdx.x] = a[blockIdx.x * 16 + threadIdx.x];"
    np.testing.assert_array_equal(launch(gpu_process, body, [A, B], blocks=4, threads=16)[1], A)


ARRIVE, CLUSTER_WAIT = (
    f'asm volatile("barrier.cluster.{name}.aligned;" :  :  : "memory");' for name in ("arrive.release", "wait.acquire")
)
MEET = ARRIVE + "\n" + CLUSTER_WAIT
BEGIN = 'asm volatile("mbarrier.init.shared.b64 [%0], %1;" :  : "r"(bar), "r"(1) : "memory");'
EXPECT = (
    'asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" : : "r"(bar), "r"({bytes}));'
)
COPY = (
    'asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster '
    '[%0], [%1], %2, [%3], %4;" : '
    ': "r"(__cvta_generic_to_shared({to})), "l"({source}), "r"({bytes}), "r"(bar), "h"(3));'
)
COPIED = (
    'asm volatile("{{ .reg .pred p; L: mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%0], %1, %2; '
    '@p bra.uni D; bra.uni L; D: }}" :: "r"(bar), "r"({turn}), "r"(1000) : "memory");'
)


EXPECT_ALL, COPIED_FIRST = EXPECT.format(bytes=256), COPIED.format(turn=0)


def exchanged(expect=EXPECT_ALL, to="&s[rank * 32]", wait=COPIED_FIRST, meet=MEET):
    """Each of two blocks copies half of a to both, twice; b becomes a, in reverse, plus 1000 in the second turn."""
    copy = f"if (t == 0) {{\n {expect}\n {COPY.format(to=to, source='&a[rank * 32]', bytes=128)}\n}}"
    return (
        f"__shared__ alignas(64) uint64_t m[1]; {SHARED} unsigned t = threadIdx.x, rank = blockIdx.x;\n"
        f"unsigned bar = __cvta_generic_to_shared(m);\nif (t == 0) {{\n {BEGIN}\n}}\n{MEET}\n"
        f"{copy}\n{wait}\nb[64 * rank + 63 - t] = s[t];\n{meet}\n"
        f"{copy}\n{COPIED.format(turn=1)}\nb[64 * rank + 63 - t] = s[t] + 1000;"
    )


@pytest.mark.parametrize("run", ORDERS, ids=str)
def test_blocks_of_a_cluster_copy_for_each_other(gpu_process, run):
    _, found = launch(gpu_process, exchanged(), [A, np.zeros(128, np.float32)], run, blocks=2, cluster=2)
    np.testing.assert_array_equal(found.reshape(2, 64), [A[::-1] + 1000] * 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"wait": ""}, "nobody has written|for which this thread has not waited"),
        ({"meet": ""}, "is a race with a read"),
        ({"meet": ARRIVE}, "is a race with a read"),
        ({"meet": CLUSTER_WAIT}, "without having arrived"),
        ({"expect": ""}, "1 arrivals and -256 bytes are missing"),
        ({"expect": EXPECT.format(bytes=272)}, "0 arrivals and 16 bytes are missing"),
        ({"to": "&s[rank * 33]"}, "no multiples of 16"),
        ({"to": "&s[rank * 36]"}, "outside of every array"),
    ],
)
def test_faults_of_a_cluster_are_seen(gpu_process, changes, said):
    with pytest.raises(EmulatorError, match=said):
        launch(gpu_process, exchanged(**changes), [A, np.zeros(128, np.float32)], blocks=2, cluster=2)


def layout(shape, strides):
    """Offsets of a CuTe layout, its first coordinate the fastest."""
    offsets = np.zeros(1, int)
    for n, stride in zip(shape, strides, strict=True):
        offsets = (np.arange(n)[:, None] * stride + offsets).ravel()
    return offsets


def fragment(threads, values):
    """(lane, value) to its place in a matrix, from CuTe's layouts ((shape, strides) of lanes, and of values)."""
    return layout(*threads)[:, None] + layout(*values)[None, :]


# CUTLASS's MMA_Traits<SM80_16x8x16_F32F16F16F32_TN>: of a m + 16 k, of b n + 8 k, of c m + 16 n.
A_PLACES = fragment(((4, 8), (32, 1)), ((2, 2, 2), (16, 8, 128)))
B_PLACES = fragment(((4, 8), (16, 1)), ((2, 2), (8, 64)))
C_PLACES = fragment(((4, 8), (32, 1)), ((2, 2), (16, 8)))
MULTIPLY = (
    "uint x[4], y[2]; float z[4]; int t = threadIdx.x;\n"
    "for (int i = 0; i < 4; ++i) { x[i] = a[t * 4 + i]; z[i] = c[t * 4 + i]; }\n"
    "for (int i = 0; i < 2; ++i) y[i] = b[t * 2 + i];\n"
    '__asm__ __volatile__(\n"mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"\n'
    '"{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %11, %12, %13};\\n"\n'
    '      :  "=f"(z[0]), "=f"(z[1]), "=f"(z[2]), "=f"(z[3])\n'
    '      : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]), '
    '"f"(z[0]), "f"(z[1]), "f"(z[2]), "f"(z[3]));\n'
    "for (int i = 0; i < 4; ++i) c[t * 4 + i] = z[i];"
)


def multiplied(gpu_process, a, b, c, run):
    """c (M, N) + a (M, K) b^T (N, K) by one mma.sync."""
    lanes = [
        a.T.ravel()[A_PLACES].astype(np.float16).view(np.uint32),
        b.T.ravel()[B_PLACES].astype(np.float16).view(np.uint32),
        c.T.ravel()[C_PLACES].astype(np.float32),
    ]
    found = np.empty(c.size, np.float32)
    found[C_PLACES] = launch(gpu_process, MULTIPLY, lanes, run, threads=32)[2]
    return found.reshape(c.T.shape).T


@pytest.mark.parametrize("run", [Run("random"), CHECKED, Run("random", adverse=True)], ids=str)
def test_tensor_cores_take_fragments_as_cutlass_lays_them_out(gpu_process, run):
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(-9, 10, (16, 16)), rng.integers(-9, 10, (8, 16)), rng.integers(-9, 10, (16, 8))
    np.testing.assert_array_equal(multiplied(gpu_process, a, b, c, run), a @ b.T + c)


# CUTLASS's ALayout_64x16 and CLayout_64x16 of wgmma: m + 64 k, and m + 64 n.
WARPGROUP_PLACES = fragment(((4, 8, 4), (128, 1, 16)), ((2, 2, 2), (64, 8, 512)))
ALONG_COLUMNS, ALONG_DEPTH = 160, 336  # bytes between core matrices of b, each of which takes 128
FENCE, COMMIT, WAIT = (
    f'asm volatile("wgmma.{rest}.sync.aligned{groups};" :  :  : "memory");\n'
    for rest, groups in (("fence", ""), ("commit_group", ""), ("wait_group", " 0"))
)


def warpgroup_kernel(ahead, behind):
    """c (64, 16) + a (64, 16) b, with a and c from registers and b, 512 bytes, where its descriptor d says."""

    def registers(start, stop):
        return "{" + ", ".join(f"%{i}" for i in range(start, stop)) + "}"

    instruction = (
        f"wgmma.mma_async.sync.aligned.m64n16k16.f32.f16.f16 {registers(0, 8)}, {registers(8, 12)}, %12, p, 1, 1, 0;"
    )
    sums, factors = (
        ", ".join(f'"{kind}"({name}[{i}])' for i in range(n)) for kind, name, n in (("+f", "z", 8), ("r", "x", 4))
    )
    return (
        "__shared__ alignas(64) uint s[256]; int t = threadIdx.x; uint x[4]; float z[8];\n"
        "s[t] = b[t]; s[t + 128] = b[t + 128];\n__syncthreads();\n"
        "for (int i = 0; i < 4; ++i) x[i] = a[t * 4 + i];\nfor (int i = 0; i < 8; ++i) z[i] = c[t * 8 + i];\n"
        f"uint64_t e = (uint64_t)d[1] << 32 | (d[0] + (__cvta_generic_to_shared(s) >> 4));\n{ahead}"
        f'asm volatile("{{ .reg .pred p; setp.ne.b32 p, %13, 0; {instruction} }}" : {sums} '
        f': {factors}, "l"(e), "r"(1));\n'
        f"{behind}for (int i = 0; i < 8; ++i) c[t * 8 + i] = z[i];"
    )


def multiplied_by_warpgroup(gpu_process, a, b, c, run, ahead=FENCE, behind=COMMIT + WAIT):
    """c (64, 16) + a (64, 16) b^T (16, 16) by one wgmma, with b where CUTLASS has a matrix without a swizzle.

    Its canonical layout, in rows of 16 bytes: ((8, n), (1, 2)) with strides ((1, along columns), (-, along depth)).
    """
    places = layout((8, 8, 2, 2), (2, 16, ALONG_COLUMNS, ALONG_DEPTH))  # in bytes; k fastest, then n
    shared = np.zeros(512, np.float16)
    shared[places // 2] = b.reshape(2, 8, 2, 8).transpose(2, 0, 1, 3).ravel()
    registers = [places.T.ravel()[WARPGROUP_PLACES] for places in (a, c)]
    descriptor = np.array([ALONG_DEPTH // 16 << 16, ALONG_COLUMNS // 16], np.uint32)
    arrays = [registers[0].astype(np.float16).view(np.uint32), shared.view(np.uint32), registers[1].astype(np.float32)]
    found = np.empty(c.size, np.float32)
    found[WARPGROUP_PLACES] = launch(
        gpu_process, warpgroup_kernel(ahead, behind), [*arrays, descriptor], run, threads=128
    )[2]
    return found.reshape(16, 64).T


WARPGROUP_FACTORS = [np.random.default_rng(0).integers(-9, 10, shape) for shape in ((64, 16), (16, 16), (64, 16))]


@pytest.mark.parametrize("run", [Run("random"), CHECKED, Run("random", adverse=True)], ids=str)
def test_warpgroups_take_matrices_as_cutlass_lays_them_out(gpu_process, run):
    a, b, c = WARPGROUP_FACTORS
    np.testing.assert_array_equal(multiplied_by_warpgroup(gpu_process, a, b, c, run), a @ b.T + c)


@pytest.mark.parametrize(
    ("ahead", "behind", "said"),
    [
        ("", COMMIT + WAIT, "no wgmma.fence since"),
        (FENCE, COMMIT, "has not waited for products"),
        (FENCE, WAIT, "has not waited for products"),
        (FENCE, COMMIT + "x[0] = 0;\n" + WAIT, "was written before that had ended"),
        (FENCE, COMMIT + "if (t < 32) s[t] = 0;\n" + WAIT, "is a race with a read by several threads"),
        ("if (t < 64) return;\n" + FENCE, COMMIT + WAIT, "another of its warps"),
    ],
)
def test_products_that_go_on(gpu_process, ahead, behind, said):
    with pytest.raises(EmulatorError, match=said):
        multiplied_by_warpgroup(gpu_process, *WARPGROUP_FACTORS, CHECKED, ahead, behind)


def test_sums_are_no_numbers_while_their_product_goes_on(gpu_process):
    found = multiplied_by_warpgroup(
        gpu_process, *WARPGROUP_FACTORS, CHECKED, behind=COMMIT + "float early = z[0];\n" + WAIT + "z[0] = early;\n"
    )
    assert np.count_nonzero(np.isnan(found)) == 128


def test_adverse_tensor_cores_cut_sums_off(gpu_process):
    """A product of a whole unit in the last place of c is added; one of half a unit is lost, whatever its sign."""
    a, b, c, unit = np.zeros((16, 16)), np.zeros((8, 16)), np.zeros((16, 8)), 2.0**-23
    a[:3, 0], b[:, 0], c[:3] = (2.0**-11, 2.0**-12, -(2.0**-12)), 2.0**-12, [[1 + unit], [1 + unit], [1]]
    for adverse, expected in (
        (False, [1 + 2 * unit, 1 + 2 * unit, 1 - unit / 2]),  # the second is a tie
        (True, [1 + 2 * unit, 1 + unit, 1]),
    ):
        found = multiplied(gpu_process, a, b, c, Run("random", adverse=adverse))
        assert [float(total) - 1 for total in found[:3, 0]] == [total - 1 for total in expected]


def test_matrices_are_loaded_as_cutlass_lays_them_out(gpu_process):
    """Copy_Traits<SM75_U32x4_LDSM_N>: lane t's word i is word t + 32 i of all lanes' rows, one behind the other."""
    body = (
        "__shared__ alignas(64) uint s[128]; int t = threadIdx.x;\n"
        "for (int i = 0; i < 4; ++i) s[((t * 4 + i) * 5) & 127] = a[((t * 4 + i) * 5) & 127];\n__syncthreads();\n"
        "uint d[4]; uint row = __cvta_generic_to_shared(&s[(31 - t) * 4]);\n"
        'asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(d[0]), "=r"(d[1]), '
        '"=r"(d[2]), "=r"(d[3]) : "r"(row) : "memory");\n'
        "for (int i = 0; i < 4; ++i) b[t * 4 + i] = d[i];"
    )
    words = np.random.default_rng(0).integers(0, 2**32, (32, 4), np.uint32)
    _, found = launch(gpu_process, body, [words, np.zeros_like(words)], threads=32)
    np.testing.assert_array_equal(found, words[::-1].reshape(4, 32).T)


def nearest_half(exact):
    """The float16 nearest to a fraction, ties to even: numpy's rounding of a float64 is within one of it."""
    near = np.float16(float(exact))
    candidates = [near, np.nextafter(near, np.float16(np.inf)), np.nextafter(near, np.float16(-np.inf))]
    return min(candidates, key=lambda half: (abs(Fraction(float(half)) - exact), half.view(np.uint16) & 1))


def test_arithmetic_of_halves_rounds_once(gpu_process):
    """Sums and products of pairs, among them ones that are off if they are rounded to float32 on the way."""
    rng = np.random.default_rng(0)
    halves = (rng.standard_normal((3, 128)) * 2.0 ** rng.integers(-8, 8, (3, 128))).astype(np.float16)
    # 1 + 2^-11 is a tie of float16, and the product too small to be seen beside it in float32
    halves[:, 0] = 1 + 2.0**-10, 2.0**-11, 2.0**-24
    halves[:, 1] = 2.0**-13, 2.0**-13, 1
    halves[:, 2:6] = [[2.0**-12] * 4, [2.0**-12, -(2.0**-12), 2.0**-13, -(2.0**-13)], [1, 1 + 2.0**-10, 1, 1]]
    body = (
        "half2 x = ((half2*)a)[threadIdx.x], y = ((half2*)b)[threadIdx.x], z = ((half2*)c)[threadIdx.x];\n"
        "((half2*)d)[threadIdx.x] = __hfma2(x, y, z); ((half2*)d)[threadIdx.x + 64] = __hmul2(x, y);\n"
        "((half2*)d)[threadIdx.x + 128] = __hsub2(x, y);"
    )
    *_, found = launch(gpu_process, body, [*halves, np.zeros((3, 128), np.float16)])
    for x, y, z, (fused, product, difference) in zip(*halves, found.T, strict=True):
        x, y, z = (Fraction(float(half)) for half in (x, y, z))
        assert (fused, product, difference) == tuple(map(nearest_half, (x * y + z, x * y, x - y)))


@pytest.mark.parametrize("function", ["expf", "exp2f", "logf", "cosf", "sinf"])
def test_adverse_functions_are_off_by_an_ulp_or_two(gpu_process, function):
    x = np.linspace(0.25, 3, 64).astype(np.float32)
    body = f"b[threadIdx.x] = {function}(a[threadIdx.x]);"
    exact, off = (launch(gpu_process, body, [x, B], Run("random", adverse=adverse))[1] for adverse in (False, True))
    ulps = np.abs(exact.view(np.int32) - off.view(np.int32))
    assert set(ulps) == set(range(2 if function == "logf" else 3))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("extern __shared__ float s[];", "__shared__ that is not emulated"),
        ('asm("bar.sync 0;");', "asm that is not emulated"),
    ],
)
def test_what_is_not_emulated_is_refused(body, said):
    with pytest.raises(ValueError, match=said):
        rewritten(source(body, "float* a", 32))
