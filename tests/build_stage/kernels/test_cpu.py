"""Every CPU kernel against numpy in float64, at sizes that are multiples of nothing.

Bounds follow from float32 alone: any order of summing K products, fused or not, is off by at most (K + 1) u sum |x w|,
with u = 2**-24 (Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1).
"""

from dataclasses import dataclass, replace
from functools import cache

import msgspec
import numpy as np
import pytest
from tvm.script import tirx as T

from build.compiler import codegen, processor_target
from build.kernels.cpu import vector
from build.kernels.cpu.attention.kernel import rolling_attention
from build.kernels.cpu.embedding import embedding
from build.kernels.cpu.level import LEVELS, Tile, runnable_levels
from build.kernels.cpu.linear import linear
from build.kernels.cpu.mixture import mixture
from build.kernels.cpu.norm import rms_norm
from build.kernels.cpu.residual import residual
from build.kernels.cpu.rotation import rotation
from build.kernels.cpu.swiglu import swiglu
from build.kernels.shapes import Embedding, Linear, Mixture, RollingAttention
from export.weights.format import ModelTensor
from export.weights.table import load
from runtime.artifact.caches import RING_BLOCK, cache_format
from runtime.artifact.cpu import cpuinfo_flags, missing_features
from runtime.artifact.layouts import PANEL
from runtime.artifact.rotary import QueryScaling
from runtime.artifact.schemes import ROUNDING_LEVELS
from runtime.artifact.tensor_file import bits_dtype
from tests.helpers import cache_reference
from tests.helpers.cpu_products import (
    DYNAMIC,
    FORMATS,
    FUSED,
    call,
    output,
    processor_of,
    product,
    run_product,
    skip_unless_runnable,
    stored_at_random,
)
from tests.helpers.kernels import PROCESSORS, aligned, compiled, machine_code, packed
from tests.helpers.mixture_reference import check as check_mixture
from tests.helpers.rotary_reference import query_factor

U = 2.0**-24
EXP_ULPS = 2  # for `vector.exp`; test_exp measures it
LANES = 8
# Not NaN: what no query sees is multiplied by zero.
NEVER_WRITTEN = {"float32": 3e4, "float16": 3e4, "float8_e4m3fn": 100, "int8": 100, "uint8": 100}
# The range of a column's numbers, relative to its largest, by the dtypes whose products are those of whole numbers.
LEVELS_OF_COLUMNS = {"int8": 1, "uint8": 2}
BY_NAME = {level.name: level for level in LEVELS}
AVX2, VNNI = BY_NAME["avx2"], BY_NAME["avx512-vnni"]
BEST = runnable_levels()[0]
WIDEST = "512 bits"  # of WIDTHS


def plain_dot(sums, weights, x, at):
    """The result of `vpdpbusd`, from shifts and products.

    Byte j of each word of weights, unsigned, times byte j of x, signed.
    """
    words, four = T.reinterpret("int32x16", weights), T.broadcast(T.reinterpret("int32", x[T.ramp(at, 1, 4)]), 16)
    for j in range(4):
        unsigned = (words >> T.broadcast(T.int32(8 * j), 16)) & T.broadcast(T.int32(255), 16)
        sums = sums + unsigned * ((four << T.broadcast(T.int32(24 - 8 * j), 16)) >> T.broadcast(T.int32(24), 16))
    return sums


# The kernels of AVX-512 VNNI with its one instruction spelled out, so that everything around it is proved on every
# machine.
SPELLED_OUT = replace(
    VNNI,
    name="vnni-spelled-out",
    flags=(),
    dots={rounding: replace(dot, add=plain_dot) for rounding, dot in VNNI.dots.items()},
)


# The tiles of AMX have tests in `test_rows.py`: their products equal those of AVX-512 VNNI. AVX-512 by itself
# multiplies as AVX2 does; `test_linear_of_rounded_tokens_in_whole_registers` has its wider vectors.
@pytest.fixture(
    params=[*(level for level in LEVELS if level.name not in ("amx", "avx512-bf16", "avx512")), SPELLED_OUT],
    ids=lambda level: level.name,
)
def level(request):
    """Every way to multiply whole numbers that this machine can run.

    `test_each_level_multiplies_integers_with_its_own_instruction` looks at the machine code of all levels.
    """
    skip_unless_runnable(request.param)
    return request.param


@dataclass(frozen=True)
class FloatLevel:
    """The part of a level that is meant for kernels that multiply no integers: access to anything else fails."""

    lanes: int
    tile: Tile

    @classmethod
    def of(cls, level):
        return cls(level.lanes, level.tile)


@dataclass(frozen=True)
class PairLevel(FloatLevel):
    """What attention over whole numbers sees besides: the processor's flags, which choose the instruction."""

    flags: tuple[str, ...]

    @classmethod
    def of(cls, level):
        return cls(level.lanes, level.tile, level.flags)


# Levels that differ from another one only in how they multiply whole or rounded numbers are not run: seen this way,
# they are the same. AVX2 and `any` are the same too, for two processors.
SAME_FLOATS = {"amx": "avx512", "avx512-bf16": "avx512", "avx512-vnni": "avx512", "avx-vnni": "avx2"}
FLOAT_LEVELS = {level.name: FloatLevel.of(level) for level in LEVELS if level.name not in SAME_FLOATS}


@pytest.fixture(params=FLOAT_LEVELS)
def float_level(request):
    """A level as all its float kernels see it, and the processor for which they are compiled to run here."""
    return FLOAT_LEVELS[request.param], processor_of(BY_NAME[request.param])


@pytest.mark.parametrize("name", SAME_FLOATS)
def test_without_integers_levels_are_the_same(name):
    """So the float kernels that are run at one level are those of the other."""
    assert FloatLevel.of(BY_NAME[name]) == FLOAT_LEVELS[SAME_FLOATS[name]]


# Whose machine code is looked at: the formats that scales are rounded to, and new ways of widening numbers.
INSPECTED = [name for name in FORMATS if not name.startswith("carried")] + ["carried int8 groups", "carried float8"]
# rows, N, K. N is below, at, near and beyond one panel, and in whole panels of gate and up; K is odd, prime, below and
# beyond a block and a group.
SIZES = [(1, 31, 33), (7, 64, 256), (1, 64, 192), (2, 1, 1), (7, 45, 331), (512, 65, 40)]
# for int4
WHOLE_WORDS = [(1, 31, 40), (7, 64, 256), (1, 64, 256), (1, 64, 136), (2, 1, 8), (7, 45, 136), (512, 65, 40)]


def test_every_level_has_a_processor_with_its_flags():
    for level in LEVELS:
        features = codegen.llvm_get_cpu_features(processor_target(level.processor))
        assert not missing_features(level.flags, frozenset(cpuinfo_flags(map(str, features))))


# By level: its registers, its multiply-add for floats (with operands in either order) and its product for int8
# activations.
REGISTERS = {"amx": "zmm", "avx512-vnni": "zmm", "avx512": "zmm", "avx-vnni": "ymm", "avx2": "ymm", "any": "xmm"}
WIDER = {"amx": (), "avx512-vnni": (), "avx512": (), "avx-vnni": ("zmm",), "avx2": ("zmm",), "any": ("zmm", "ymm")}
MULTIPLY_ADD = {"avx512": "vfmadd", "avx2": "vfmadd", "any": "mulps"}
INTEGER_PRODUCT = {
    "amx": "vpdpbusd",
    "avx512-vnni": "vpdpbusd",
    "avx512": "vpmadd",
    "avx-vnni": "{vex}\tvpdpbusd",
    "avx2": "vpmadd",
}


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("name", INSPECTED)
@pytest.mark.parametrize("own", [BY_NAME[name] for name in FLOAT_LEVELS], ids=lambda level: level.name)
def test_each_level_compiles_to_its_own_instructions(own, name, rows):
    """The target is a processor that has them, whatever this machine has, so that no level goes untested."""
    code = machine_code(linear(own, Linear((1, rows), 64, 64, FORMATS[name])), PROCESSORS[own.name])
    assert REGISTERS[own.name] in code
    assert MULTIPLY_ADD[own.name] in code
    assert not [wider for wider in WIDER[own.name] if wider in code]


@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("name", [name for name in INSPECTED if name in DYNAMIC])
@pytest.mark.parametrize("own", [BY_NAME[name] for name in INTEGER_PRODUCT], ids=lambda level: level.name)
def test_each_level_multiplies_integers_with_its_own_instruction(own, name, rows):
    """Many rows are multiplied in tiles where there are some, unless groups of 16 are shorter than a tile."""
    code = machine_code(linear(own, Linear((1, rows), 64, 64, DYNAMIC[name])), PROCESSORS[own.name])
    assert REGISTERS[own.name] in code
    assert not [wider for wider in WIDER[own.name] if wider in code]
    in_tiles = own.name == "amx" and rows > 1 and DYNAMIC[name].group_size != 16
    assert ("tdpbssd" if in_tiles else INTEGER_PRODUCT[own.name]) in code
    assert code.count("tilerelease") == code.count("ldtilecfg") == int(in_tiles)


# By level: what multiplies two numbers of 16 bits by two, and adds them up.
PAIR_PRODUCT = {
    "avx512-vnni": "vpdpwssd",
    "avx512": "vpmaddwd",
    "avx-vnni": "vpdpwssd",
    "avx2": "vpmaddwd",
    "any": "mulps",  # the product is spelled out; scales are floats everywhere
}


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("own", [BY_NAME[name] for name in PAIR_PRODUCT], ids=lambda level: level.name)
def test_each_level_attends_over_whole_numbers_with_its_own_instruction(own, dtype):
    shape = RollingAttention(1, 1, 3, 1, 32, 1, 64, 64, dtype, 0.25)
    code = machine_code(rolling_attention(own, shape), PROCESSORS[own.name])
    assert PAIR_PRODUCT[own.name] in code
    assert not [wider for wider in WIDER[own.name] if wider in code]


def check_product(level, processor, shape, seed=0):
    """Compare a product with its exact result.

    A sum of K products is off by (K + 1) u of what was added, and by u more for each earlier rounding of its terms.

    Terms are rounded by the norm ((K + 1) / 2 + 6, see `test_rms_norm`), by the scale, and by the zero point, whose
    removal for int4 takes off up to 15 / 8 times the sizes of all terms. SwiGLU's derivative is at most 1.1 on either
    side, times the other side.
    """
    made = product(shape, seed)
    y = run_product(level, processor, made)
    terms = (shape.k + 4) * (4 if shape.weight.dtype == "int4" else 1) + (
        (shape.k + 1) / 2 + 6 if shape.norm_eps is not None else 0
    )
    bound = terms * U * made.size + 2 * U * np.abs(made.exact)
    if shape.swiglu:
        (gate, up), (gate_bound, up_bound) = np.split(made.exact, 2, -1), np.split(bound, 2, -1)
        activated = gate / (1 + np.exp(-gate))
        exact = activated * up
        bound = (
            1.1 * gate_bound * np.abs(up)
            + np.abs(activated) * up_bound
            + 2 * gate_bound * up_bound
            + (2 * EXP_ULPS + 4) * U * np.abs(exact)
        )
    else:
        exact = made.exact
    assert (np.abs(y - exact) <= bound).all()


def sizes(every_size, name, fused):
    """All sizes at the level that all our machines have.

    The other levels, and products fused with other work, get one row and several, of whole panels. Formats that are
    only carried differ in how groups are read, not in what is fused around them: they get one row and several at once.
    """
    every = WHOLE_WORDS if "int4" in name else SIZES
    if name.startswith("carried"):
        return {"alone": every[:2], "norm, swiglu": every[1:2]}.get(fused, []) if every_size else []
    if every_size:
        return every if fused == "alone" else every[1:3]
    return every[:2] if fused == "alone" else []


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("name", FORMATS)
def test_linear(float_level, name, fused):
    level, processor = float_level
    for rows, n, k in sizes(float_level == (FLOAT_LEVELS["avx2"], PROCESSORS["avx2"]), name, fused):
        check_product(level, processor, Linear((1, rows), n, k, FORMATS[name], **FUSED[fused]))


@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("name", DYNAMIC)
def test_linear_of_rounded_tokens(level, name, fused):
    """Integers are exact, so only the scales contribute errors, and float32 where they are multiplied as floats.

    x is kept away from halves, where the last bit of the norm would decide; of levels of 16 bits, it has only whole
    ones, which a norm would not leave so.
    """
    if DYNAMIC[name].rounding == "int16" and "norm_eps" in FUSED[fused]:
        return
    for rows, n, k in sizes(level is AVX2, name, fused):
        check_rounded_product(level, processor_of(level), Linear((1, rows), n, k, DYNAMIC[name], **FUSED[fused]))


def check_rounded_product(level, processor, shape):
    seed = next(seed for seed in range(100) if far_from_halves(product(shape, seed)))
    check_product(level, processor, shape, seed)


def far_from_halves(made):
    """Whether every rounded number is so far from the middle of two levels that float32 cannot take the other one."""
    if made.shape.weight.rounding == "int16":
        return np.array_equal(made.levels, np.rint(made.levels))
    roundings = 4 + ((made.shape.k + 1) / 2 + 6 if made.shape.norm_eps is not None else 0)
    return (np.abs(np.abs(made.levels - np.rint(made.levels)) - 0.5) > 127 * roundings * U).all()


@pytest.mark.parametrize("width", [WIDEST], indirect=True)
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("name", FORMATS)
def test_linear_in_whole_registers(width, name, rows):
    """The other widths are those of `float_level`."""
    check_product(FLOAT_LEVELS["avx512"], width, Linear((1, rows), 45, 136, FORMATS[name]))


@pytest.mark.parametrize("width", [WIDEST], indirect=True)
@pytest.mark.parametrize("name", DYNAMIC)
def test_linear_of_rounded_tokens_in_whole_registers(width, name):
    level = BY_NAME["avx512"]
    eps = None if DYNAMIC[name].rounding == "int16" else 1e-5
    check_rounded_product(level, width, Linear((1, 7), 45, 136, DYNAMIC[name], norm_eps=eps))


def test_linear_of_one_token(float_level):
    check_product(*float_level, Linear((1, 1), 40, 9, FORMATS["float32"], one_of=3, norm_eps=1e-5))


def test_linear_of_two_batch_rows_and_three_tokens(float_level):
    """The leading dimensions are flattened, in order."""
    check_product(*float_level, Linear((2, 3), 40, 9, FORMATS["float32"]))


@pytest.mark.parametrize("rows", [1, 3])
def test_linear_never_reads_the_padding_of_the_last_panel(rows):
    """Whatever follows the last output changes nothing."""
    made = product(Linear((1, rows), 35, 8, FORMATS["float32"]))
    clean = run_product(AVX2, processor_of(AVX2), made)
    made.arrays[1][-1, :, 3:] = np.nan
    assert np.array_equal(clean, run_product(AVX2, processor_of(AVX2), made))


@pytest.mark.parametrize("name", [*(name for name in FORMATS if not FORMATS[name].reordered), "dynamic"])
def test_embedding(width, name):
    """A gather and at most two products: exact, including the last row of the last panel."""
    stored = DYNAMIC["int8"] if name == "dynamic" else FORMATS[name]
    tensor = ModelTensor(name="w", shape=(301, 16), stored=msgspec.structs.replace(stored, reordered=False))
    arrays = stored_at_random(tensor, np.random.default_rng(0))
    parts = packed(tensor, arrays, "llvm")
    ids = np.array([[0, 300, 1], [31, 32, 299]], np.int64)
    y = output(2, 3, 16)
    call(compiled(embedding(AVX2, Embedding((2, 3), 301, 16, stored)), width), ids, *parts, y)
    assert np.array_equal(y, load(tensor, arrays)[ids])


@pytest.mark.parametrize("factor", [1.0, 1.138629436111989])
@pytest.mark.parametrize("function", ["cos", "sin"])
def test_rotation(width, function, factor):
    """The angle is rounded once, which moves the result by as much; the library's cosine is off by 1 ulp or less.

    The factor and the product with it are rounded too.
    """
    positions = np.array([[-3, 0, 1], [5, 4095, 131071]], np.int64)
    frequencies = (1e6 ** -(np.arange(8) / 8)).astype(np.float32)
    y = output(2, 1, 3, 8)
    call(compiled(rotation(AVX2, (2, 3), 8, function, factor), width), positions, frequencies, y)
    angles = (positions[:, None, :, None].astype(np.float32) * frequencies).astype(np.float64)
    assert (np.abs(y - getattr(np, function)(angles) * factor) <= (2 if factor == 1 else 5) * U).all()


def test_residual(width):
    a, b = (np.random.default_rng(seed).standard_normal((1, 5, 33)).astype(np.float32) for seed in (0, 1))
    y = output(1, 5, 33)
    call(compiled(residual(AVX2, (1, 5, 33)), width), a, b, y)
    assert np.array_equal(y, a + b)


@pytest.mark.parametrize(("lead", "dim"), [((1, 1), 64), ((1, 1), 7), ((2, 3), 20), ((1, 16), 33), ((1, 2), 2)])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_rms_norm(lead, dim, eps):
    check_rms_norm(PROCESSORS["avx2"], lead, dim, eps)


def test_rms_norm_for_every_width(width):
    check_rms_norm(width, (1, 16), 33, 1e-5)


def check_rms_norm(processor, lead, dim, eps):
    generator = np.random.default_rng(0)
    x = (generator.standard_normal((*lead, dim)) * generator.choice([1e-3, 1, 1e15], (*lead, 1))).astype(np.float32)
    x[0, 0] = 0 if lead == (2, 3) else x[0, 0]  # a row of zeros stays zero
    weight = generator.standard_normal(dim).astype(np.float32)
    y = output(*lead, dim)
    call(compiled(rms_norm(AVX2, lead, dim, eps), processor), x, weight, y)
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(eps)) * weight
    # dim + 1 roundings of the sum count half after the root; the mean, eps, root, inverse and two products add 6 more.
    assert (np.abs(y - exact) <= ((dim + 1) / 2 + 6) * U * np.abs(exact)).all()


@pytest.mark.parametrize(("lead", "hidden"), [((1, 1), 96), ((1, 1), 45), ((2, 3), 90), ((1, 16), 7)])
def test_swiglu(width, lead, hidden):
    generator = np.random.default_rng(0)
    gate = generator.choice([-1e4, -200, -90, -88, -20, -1, -1e-6, 0, 1e-6, 1, 20, 88, 90, 200, 1e4], (*lead, hidden))
    gate = (gate * generator.uniform(0.9, 1.1, gate.shape)).astype(np.float32)
    up = generator.standard_normal(gate.shape).astype(np.float32)
    y = output(*lead, hidden)
    call(compiled(swiglu(AVX2, lead, hidden), width), np.concatenate([gate, up], -1), y)
    wide = gate.astype(np.float64)
    exact = wide / (1 + np.exp(np.minimum(-wide, 700))) * up
    # exp, sum, quotient and product each round; where exp is clamped (gate < -88.37), gate / exp(88.37) is all that
    # remains of either side.
    bound = (2 * EXP_ULPS + 4) * U * np.abs(exact) + np.where(
        gate < -88, 2 * np.abs(wide * up) * np.exp(-vector.LARGEST), 0
    )
    assert (np.abs(y - exact) <= bound).all()


@pytest.fixture(scope="module")
def exp_kernel():
    @T.prim_func
    def kernel(x: T.Buffer((4096,), "float32"), y: T.Buffer((4096,), "float32")):
        T.func_attr({"tirx.noalias": True})
        for i in T.serial(4096 // LANES):
            for v in T.vectorized(LANES):
                y[i * LANES + v] = vector.exp(x[i * LANES + v])

    return compiled(kernel)


def exp_of(kernel, values):
    x = np.resize(np.asarray(values, np.float32), (-(-len(values) // 4096), 4096))
    y = output(*x.shape)
    for row in range(len(x)):
        call(kernel, x[row], y[row])
    return y.ravel()[: len(values)].copy()


def test_exp(exp_kernel):
    """exp is within 2 ulp over the whole range.

    Cephes states a relative error of 1.7e-7 = 1.4 ulp for this polynomial, and the last product rounds once more.
    """
    x = np.linspace(vector.SMALLEST, vector.LARGEST, 4096 * 40).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(exp_of(exp_kernel, x) - exact) <= EXP_ULPS * 2 * U * exact).all()


def test_exp_at_its_ends(exp_kernel):
    x = [0, -0.0, -1e30, -3e38, -88, -87.33, 88.37, 100, 1e30]
    found = exp_of(exp_kernel, x)
    assert found[:2].tolist() == [1, 1]
    assert np.isfinite(found).all()
    assert (found[2:6] <= 2.0**-125).all()  # close to zero, and never negative
    assert (found[2:6] >= 0).all()
    assert (found[6:] >= 2.3e38).all()


@pytest.mark.parametrize("size", [127, 32512])
def test_exact_quotient(width, size):
    """The quotients are those of a division, bit for bit, above all next to halves, where levels meet."""
    rows, lanes = 512, 512
    generator = np.random.default_rng(size)
    exponents = generator.uniform(-30, 30, (rows, 1))
    divisors = (10**exponents).astype(np.float32)
    halves = generator.integers(-size, size, (rows, lanes)) + np.float32(0.5)
    near = (halves * divisors.astype(np.float64)).astype(np.float32)
    x = np.where(generator.random((rows, lanes)) < 0.5, near, generator.uniform(-size, size, (rows, lanes)) * divisors)
    x = np.nextafter(x.astype(np.float32), generator.choice([-np.inf, np.inf], x.shape).astype(np.float32))

    @T.prim_func
    def kernel(
        x: T.Buffer((rows, lanes), "float32"), by: T.Buffer((rows, 1), "float32"), y: T.Buffer((rows, lanes), "float32")
    ):
        T.func_attr({"tirx.noalias": True})
        for i in T.serial(rows):
            for c in T.serial(lanes // LANES):
                for v in T.vectorized(LANES):
                    y[i, c * LANES + v] = vector.exact_quotient(x[i, c * LANES + v], by[i, 0], T.float32(1) / by[i, 0])

    y = output(rows, lanes)
    call(compiled(kernel, width), x, divisors, y)
    assert np.array_equal(y.view(np.uint32), (x / divisors).view(np.uint32))


@dataclass(frozen=True)
class Attention:
    """One schedule of calls for several sequences; sequence i joins `late[i]` tokens after the schedule begins.

    A call of one token has a row for each sequence; a longer one is made for each sequence by itself, and is padded
    where the sequence joins within it.
    """

    chunks: tuple[int, ...]
    late: tuple[int, ...]
    heads: tuple[int, int]
    head_dim: int
    window: int
    dtype: str = "float32"
    scale: float = 0.25
    query_scaling: QueryScaling | None = None


ATTENTION = {
    "decode-crosses-the-window-twice": Attention((1,) * 11, (0,), (4, 2), 16, 5),
    "one-chunk-far-longer-than-the-window": Attention((16,), (0,), (3, 1), 20, 5),
    "chunks-and-decode-late": Attention((3, 3, 16, 1, 1, 3), (2,), (4, 4), 20, 8),
    "two-sequences-one-later-than-a-chunk": Attention((3, 3, 16, 3, 1, 1), (1, 5), (6, 2), 16, 8, scale=0.7),
    "window-of-one": Attention((3, 1, 1), (0,), (4, 1), 16, 1),
    "window-never-full": Attention((16, 3, 1), (4,), (3, 1), 64, 64),
    "head-dim-128": Attention((3, 3, 1), (1, 0), (4, 1), 128, 4),
    "float16": Attention((3, 3, 1, 16, 1), (2, 0), (4, 1), 20, 8, "float16"),
    "steps-seen-whole-and-in-part": Attention((80, 80, 1, 1), (3,), (2, 1), 16, 96),
    "float16-long": Attention((16,) * 3, (3,), (2, 2), 64, 33, "float16"),
    "fp8": Attention((3, 3, 1, 3, 1, 3), (2, 0), (4, 1), 20, 8, "float8_e4m3fn"),
    "int8": Attention((3, 3, 1, 16, 1), (2, 0), (4, 1), 20, 8, "int8"),
    "scaled-queries": Attention(
        (3, 16, 1, 1), (4,), (4, 2), 16, 8, query_scaling=QueryScaling(beta=0.5, original_context=5)
    ),
    "int8-long": Attention((80, 80, 1, 1), (3,), (2, 2), 16, 96, "int8"),
    "int4": Attention((3, 3, 1, 16, 1, 1), (2, 0), (4, 1), 32, 8, "uint8"),
    "int4-long": Attention((80, 80, 1, 1), (3,), (2, 2), 64, 96, "uint8"),
    "int4-window-without-blocks": Attention((5, 3, 1, 1, 1), (2,), (3, 1), 96, 7, "uint8"),
}


def attention_inputs(case, generator):
    """qkv, positions, cos and sin of all tokens; positions are negative before a sequence joins.

    What is before it is NaN, to show whether anything reads it. Narrow rings get quarter turns,
    whose rotation is exact, so that no rounding can fall on either side, and numbers in whole levels of int8.
    """
    total, batch, half = sum(case.chunks), len(case.late), case.head_dim // 2
    qkv = generator.standard_normal((batch, total, (case.heads[0] + 2 * case.heads[1]) * case.head_dim)).astype(
        np.float32
    )
    positions = np.arange(total) - np.array(case.late)[:, None]
    qkv[positions < 0] = np.nan
    if case.dtype == "int8":
        columns = qkv.reshape(batch, total, -1, case.head_dim)[:, :, case.heads[0] :]
        columns[...] = np.clip(np.rint(columns * 40), -127, 127)
        # the largest number makes the scale a power of two
        columns[..., 0] = 127 * 2.0 ** generator.integers(-8, -5, columns.shape[:-1])
        columns[..., 1:] *= columns[..., :1] / 127
        qkv[positions < 0] = np.nan
    if case.dtype != "float32":
        turns = generator.integers(0, 4, (batch, 1, total, half))
        return qkv, positions, np.array([1, 0, -1, 0], np.float32)[turns], np.array([0, 1, 0, -1], np.float32)[turns]
    angles = generator.uniform(-np.pi, np.pi, (batch, 1, total, half))
    return qkv, positions, np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotated(x, cos, sin):
    """Rotate x (tokens, heads, D) by cos and sin (tokens, D / 2)."""
    a, b = np.split(x, 2, axis=-1)
    c, s = cos[:, None], sin[:, None]
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


def as_stored(columns, dtype):
    """Columns (tokens, heads, D) as a ring holds them, in float64."""
    if dtype != "int8":
        return cache_reference.widened(cache_reference.stored(columns, dtype))
    scales = np.abs(columns).max(-1, keepdims=True) / 127
    return np.rint(columns / scales) * scales


def attention_reference(case, qkv, positions, cos, sin):
    """One row's outputs (tokens, heads, D), their error bounds, and its keys and values as stored, in float64."""
    h, kv = case.heads
    d = case.head_dim
    parts = qkv.astype(np.float64).reshape(len(qkv), h + 2 * kv, d)
    factors = np.array([query_factor(case.query_scaling, position) for position in positions])
    query = rotated(parts[:, :h], cos, sin) * factors[:, None, None]
    key, value = (as_stored(x, case.dtype) for x in (rotated(parts[:, h : h + kv], cos, sin), parts[:, h + kv :]))
    out, bounds = np.zeros(query.shape), np.zeros(query.shape)
    for i in np.flatnonzero(positions >= 0):
        seen = (positions >= 0) & (positions <= positions[i]) & (positions > positions[i] - case.window)
        for head in range(h):
            k, v = key[seen, head // (h // kv)], value[seen, head // (h // kv)]
            scores = k @ query[i, head] * case.scale
            shares = np.exp(scores - scores.max())
            shares /= shares.sum()
            out[i, head] = shares @ v
            # Rotation and scaling: 3 roundings on q, 3 on k, relative to what is rotated; the dot product D + 1. The
            # factor of a position takes 5 more: a logarithm (2), two products and a sum. An error of e in a score
            # moves its share by e, and the sum of shares by as much; then come exp and the sums over the seen columns.
            size = (
                np.abs(np.concatenate([k, np.roll(k, d // 2, -1)])).max(-1).max()
                * np.abs(parts[i, head]).sum()
                * 2
                * case.scale
                * factors[i]
            )
            rounding = 0.0
            error = 2 * (d + (12 if case.query_scaling else 7)) * U * size + (2 * EXP_ULPS + 2 * len(k) + 4) * U
            if case.dtype in LEVELS_OF_COLUMNS:
                # Half a level of a query for each number of a key, whose scores are then exact; half a level of a
                # share, times the range of the column's numbers, for each column.
                half = 0.5 / ROUNDING_LEVELS["int16"]
                error += 2 * half * np.abs(query[i, head]).max() * np.abs(k).sum(-1).max() * case.scale
                rounding = len(k) * half * (shares * LEVELS_OF_COLUMNS[case.dtype] * np.abs(v).max(-1)).max()
            # A number of int4 is rounded twice, relative to its scale times 15 and its minimum, which are together at
            # most thrice the largest number. Keys may be, as no rotation was rounded.
            widening = 6 * U * np.abs(v).max() if case.dtype == "uint8" else 0
            bounds[i, head] = error * (shares @ np.abs(v)) + widening + rounding
    return out, bounds, key, value


attention_kernel = cache(rolling_attention)  # the kernels of AVX2 and `any` are the same for floats
ROUNDED_ATTENTION = [name for name, case in ATTENTION.items() if case.dtype in LEVELS_OF_COLUMNS]


@pytest.mark.parametrize("name", [name for name in ATTENTION if name not in ROUNDED_ATTENTION])
def test_rolling_attention(float_level, name):
    check_attention(*float_level, ATTENTION[name])


@pytest.mark.parametrize(
    ("level", "name"),
    [(AVX2, name) for name in ROUNDED_ATTENTION]
    + [(level, name) for level in (VNNI, BY_NAME["any"]) for name in ("int8-long", "int4-long")],
    ids=lambda value: getattr(value, "name", value),
    indirect=["level"],
)
def test_rolling_attention_in_whole_numbers(level, name):
    """AVX-512 by itself and AVX-VNNI have the instructions of these levels in other registers."""
    check_attention(PairLevel.of(level), processor_of(level), ATTENTION[name])


@pytest.mark.parametrize("width", [WIDEST], indirect=True)
@pytest.mark.parametrize("name", ["decode-crosses-the-window-twice", "head-dim-128", "float16-long"])
def test_rolling_attention_in_whole_registers(width, name):
    """The other widths are those of `float_level`."""
    check_attention(FLOAT_LEVELS["avx512"], width, ATTENTION[name])


def check_attention(level, processor, case):
    qkv, positions, cos, sin = attention_inputs(case, np.random.default_rng(0))
    untouched = NEVER_WRITTEN[case.dtype]
    slots = [len(case.late), *range(len(case.late) - 1)]  # of each sequence; one slot is nobody's
    rings = new_rings(case, untouched)
    untouched_rings = [ring.copy() for ring in rings]
    found = attended(level, processor, case, rings, slots)
    assert np.isfinite(found).all()  # rows of padding included
    for b, slot in enumerate(slots):
        expected, bounds, key, value = attention_reference(case, qkv[b], positions[b], cos[b, 0], sin[b, 0])
        shown = positions[b] >= 0
        assert (np.abs(found[b] - expected) <= bounds)[shown].all()
        keys, values = (
            cache_reference.widened(cache_reference.by_column([ring[slot] for ring in rings[side::2]], side))
            for side in range(2)
        )
        nothing = cache_reference.widened([ring[0, 0, 0] for ring in untouched_rings[0::2]])
        check_ring(keys, key, positions[b], nothing, 3 * U * 2 if case.dtype == "float32" else 0)
        check_ring(values, value, positions[b], nothing, 0)
    for ring, before in zip(rings, untouched_rings, strict=True):
        assert np.array_equal(ring[len(case.late) - 1], before[len(case.late) - 1])


def new_rings(case, content):
    """Rings of one slot more than there are sequences."""
    return [
        aligned(
            np.full(
                (len(case.late) + 1, case.heads[1], ring_len(case), part.width),
                1 if part.suffix else content,
                bits_dtype(part.dtype),
            )
        )
        for part in cache_format(case.dtype).parts(case.head_dim)
        for _side in ("keys", "values")
    ]


def ring_len(case):
    """Columns of a ring that the longest of the longest calls below leaves room for, in whole blocks."""
    return -(-(case.window + LONGEST_CALL - 1) // RING_BLOCK) * RING_BLOCK


LONGEST_CALL = 80  # of all cases, so that their rings do not depend on the schedule


def attended(level, processor, case, rings, slots):
    """What the kernels give for a case (sequences, tokens, heads, D), in the slots of these rings."""
    qkv, positions, cos, sin = attention_inputs(case, np.random.default_rng(0))
    h, d = case.heads[0], case.head_dim
    out = np.zeros((len(case.late), sum(case.chunks), h, d), np.float32)
    kernels = {tokens: attention_of(level, processor, case, tokens) for tokens in set(case.chunks)}
    start = 0
    for tokens in case.chunks:
        part = slice(start, start + tokens)
        order = list(range(len(case.late)))[::-1]  # rows are not in the order of their slots
        for group in [order] if tokens == 1 else [[b] for b in order]:
            inputs = [
                np.stack([padded_right(array[b], axis, part, positions[b]) for b in group])
                for array, axis in ((qkv, 0), (cos, 1), (sin, 1), (positions, 0))
            ]
            inputs[3] = np.where(inputs[3] < 0, -1, inputs[3])
            result = output(len(group), tokens, h * d)
            call(kernels[tokens], *inputs, np.array([slots[b] for b in group]), *rings, result)
            for b, own in zip(group, result.reshape(len(group), tokens, h, d), strict=True):
                out[b, part] = np.roll(own, int((positions[b, part] < 0).sum()), axis=0)
        start += tokens
    return out


@cache
def attention_of(level, processor, case, tokens):
    """The kernel of a case for calls of so many tokens: a row for each sequence, or a chunk of one."""
    rows = len(case.late) if tokens == 1 else 1
    shape = RollingAttention(
        rows, tokens, *case.heads, case.head_dim, len(case.late) + 1, case.window, ring_len(case), case.dtype,
        case.scale, case.query_scaling,
    )  # fmt: skip
    return compiled(attention_kernel(level, shape), processor)


def padded_right(array, axis, part, positions):
    """A call's part of one sequence's inputs, with what is before the sequence moved behind it."""
    return np.roll(np.take(array, range(part.start, part.stop), axis), -int((positions[part] < 0).sum()), axis)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "uint8"])
def test_rolling_attention_gives_the_same_bits_in_any_call(dtype):
    """Whatever the calls, the slots, and what the rings held before, across the wrap of the ring."""
    total = 3 * 96
    schedules = [(1,) * total, (80, 16) * 3, (80, 80, 80, *(1,) * 48), (*(1,) * 48, 16, 80, 80, 16, 16, *(1,) * 32)]
    found = []
    for i, chunks in enumerate(schedules):
        case = Attention(chunks, (0, 9), (6, 2), 32, 20, dtype)
        rings = new_rings(case, 7 * i)
        found.append(attended(PairLevel.of(BEST), processor_of(BEST), case, rings, [(i + 1) % 3, i % 3]))
    for b, late in enumerate((0, 9)):
        for other in found[1:]:
            assert np.array_equal(other[b, late:], found[0][b, late:])


@pytest.mark.parametrize("float_level", ["avx512", "avx2"], indirect=True)
def test_rows_of_one_slot_attend_as_one_after_the_other(float_level):
    """Several rows of a slot are consecutive tokens; what a later one writes is hidden from those before it."""
    level, processor = float_level
    case = Attention((1,) * 240, (0,), (4, 2), 16, 20)
    one_by_one = attended(level, processor, case, new_rings(case, 0), [1])
    qkv, positions, cos, sin = attention_inputs(case, np.random.default_rng(0))
    shape = RollingAttention(8, 1, 4, 2, 16, 2, case.window, ring_len(case), case.dtype, case.scale)
    kernel, rings = compiled(attention_kernel(level, shape), processor), new_rings(case, 0)
    for start in range(0, 240, 7):  # the eighth row is nobody's
        count = min(7, 240 - start)
        inputs = [np.moveaxis(np.take(array, range(start, start + count), axis), axis, 0) for array, axis in
                  ((qkv, 1), (cos, 2), (sin, 2), (positions, 1))]  # fmt: skip
        rows = [np.concatenate([array, np.zeros((8 - count, *array.shape[1:]), array.dtype)]) for array in inputs]
        rows[3][count:] = -1
        rows[1], rows[2] = (array.reshape(8, 1, 1, -1) for array in rows[1:3])
        result = output(8, 1, 4 * 16)
        call(kernel, *map(np.ascontiguousarray, rows), np.ones(8, np.int64), *rings, result)
        assert np.array_equal(result[:count, 0].reshape(count, 4, 16), one_by_one[0, start : start + count])


def check_ring(ring, columns, positions, untouched, relative):
    """The last L positions are in column = position mod L; columns that were never written are unchanged."""
    length = ring.shape[1]
    last = positions[-1]
    for column in range(length):
        position = last - (last - column) % length
        if position < 0:
            assert (ring[:, column] == untouched).all()
        else:
            expected = columns[position - positions[0]]
            assert (np.abs(ring[:, column] - expected) <= relative * np.nanmax(np.abs(columns))).all()


def called(function, arrays, processor=PROCESSORS["avx2"]):
    """All arrays, as the kernel leaves them."""
    held = [aligned(array) for array in arrays]
    call(compiled(function, processor), *held)
    return held


# One token (its own code) and several; sizes that are and are not multiples of a panel or a vector; an expert with more
# pairs than a tile has rows.
MIXTURE = [
    (1, 64, 96, "int8"),
    (1, 33, 7, "float32"),
    (1, 34, 30, "float16"),
    (5, 40, 33, "float16"),
    (7, 33, 7, "float32"),
    (70, 64, 48, "int8"),
]


@pytest.mark.parametrize(("tokens", "dim", "hidden_dim", "dtype"), MIXTURE)
def test_mixture(tokens, dim, hidden_dim, dtype):
    check_mixture(lambda shape, arrays: called(mixture(AVX2, shape), arrays), tokens, dim, hidden_dim, dtype)


@pytest.mark.parametrize("tokens", [1, 5])
def test_mixture_for_every_width(width, tokens):
    check_mixture(lambda shape, arrays: called(mixture(AVX2, shape), arrays, width), tokens, 40, 33, "int8")


def test_mixture_survives_scores_that_are_no_numbers():
    """The answer is meaningless, but every token still goes to experts that exist.

    So nothing is read or written beyond the arrays.
    """
    shape = Mixture((1, 3), 8, 8, 4, 2, FORMATS["float32"])
    x, weights = np.ones((1, 3, 8), np.float32), [np.ones((4, 8, PANEL), np.float32)] * 2
    scores = np.full((1, 3, 4), np.nan, np.float32)
    scratch = [np.zeros(size, kind) for size, kind in shape.scratch]
    *_, chosen, _share, count, _members, _both, _gated, _mixed = called(
        mixture(AVX2, shape), [x, scores, *weights, output(1, 3, 8), *scratch]
    )
    assert set(chosen.tolist()) <= {0, 1, 2, 3}
    assert count.sum() == 6
