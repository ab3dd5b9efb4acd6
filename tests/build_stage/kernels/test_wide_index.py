"""No index of any kernel wraps, however large its buffers; shown without their memory, by arithmetic on intervals."""

from math import prod

import numpy as np
import pytest

from build.compiler import tvm
from build.kernels.cpu.level import level_of
from build.kernels.cuda.binding import SERIAL
from build.kernels.shapes import Embedding, Linear, Mixture, RollingAttention
from build.kernels.table import CPU, CUDA, ON_TENSOR_CORES, kernels_of
from build.kernels.wide_index import NARROW_ELEMENTS, largest_buffer, widened
from export.weights.format import Storage
from runtime.artifact.manifest import TargetSpec
from runtime.artifact.signatures import ACTIVATION_LIMIT
from tests.helpers.index_bounds import wrapping
from tests.helpers.kernels import aligned, compiled, compiled_serially
from tests.helpers.untouched import untouched_memory

AVX2 = ("avx2", "fma", "f16c")
SPECS = {
    "llvm": TargetSpec(kind="llvm", dtype="fp32", cpu="x86-64-v3", cpu_features=AVX2),
    "cuda": TargetSpec(kind="cuda", dtype="fp32", cpu="x86-64-v3", cpu_features=(), arch=("sm_80",)),
    "tensor-cores": TargetSpec(kind="cuda", dtype="fp16", cpu="x86-64-v3", cpu_features=(), arch=("sm_80",)),
}

# slots, n_heads, n_kv_heads, head_dim, ring_len
LONG_CACHE = (33, 4, 2, 16, 4194304)  # of a tiny model
MINISTRAL = (17, 32, 8, 128, 131072)  # Ministral-8B at its context length
ONE_HEAD = (1, 1, 1, 128, 2**31 - 1)  # the longest cache of all, whose single head is too large


def attention_shape(sizes, tokens, cache_dtype):
    """One row of several tokens, or as many rows as there are slots; the ring is full, and so never wraps."""
    slots, heads, kv_heads, head_dim, ring_len = sizes
    rows = slots if tokens == 1 else 1
    return RollingAttention(rows, tokens, heads, kv_heads, head_dim, slots, ring_len, ring_len, cache_dtype, 0.25)


def positions_of(shape):
    """Bounds of the numbers that the engine feeds: padding is -1, and a cache without a window can be full."""
    positions = (-1, shape.ring_len - 1)
    return {"positions": positions, "newest": positions, "slots": (0, shape.slots - 1)}


KINDS = (("llvm", "float32"), ("cuda", "float32"), ("tensor-cores", "float16"))
ROUNDED = [(target, dtype) for target in ("llvm", "tensor-cores") for dtype in ("float8_e4m3fn", "int8", "uint8")]
ATTENTION = [
    *((LONG_CACHE, tokens, dtype, target) for target, dtype in KINDS[:2] for tokens in (1, 128)),
    *((LONG_CACHE, tokens, "int8", "llvm") for tokens in (1, 128)),
    *((MINISTRAL, tokens, dtype, target) for target, dtype in KINDS for tokens in (1, 128)),
    *((ONE_HEAD, 128, dtype, target) for target, dtype in KINDS),
    *((MINISTRAL, tokens, dtype, target) for target, dtype in ROUNDED for tokens in (1, 128)),
]


@pytest.mark.parametrize(("sizes", "tokens", "dtype", "target"), ATTENTION)
def test_no_index_of_attention_wraps(sizes, tokens, dtype, target):
    shape, spec = attention_shape(sizes, tokens, dtype), SPECS[target]
    kernel = kernels_of(spec)["rolling_attention"](shape)
    assert wrapping(kernel, spec.kind, positions_of(shape)) == []


@pytest.mark.parametrize(("sizes", "tokens"), [(LONG_CACHE, 1), (MINISTRAL, 128)])
def test_the_same_kernels_in_int32_would_wrap(sizes, tokens):
    """That the proof above can fail. The CPU's attention reads its rings through flat buffers, indexed by int64."""
    shape = attention_shape(sizes, tokens, "float16")
    assert wrapping(CUDA["rolling_attention"](shape, tensor_cores=True), "cuda", positions_of(shape))
    product = Linear((1, 1), VOCABULARY, WIDTH, STORED["float16"])
    with pytest.raises(ValueError, match="exceeds range of int32"):  # TVM itself finds the number of weights
        wrapping(CPU["linear"](level_of(AVX2), product), "llvm", {})


ROWS, WIDTH = ACTIVATION_LIMIT // 4096, 4096  # as many numbers as a graph may compute at once
VOCABULARY = 2**20  # the embeddings have twice as many numbers as int32 can count
STORED = {
    "float16": Storage(dtype="float16"),
    "int8": Storage(dtype="int8"),
    "int4": Storage(dtype="int4", group_size=32, offsets="zero_points"),
}
DYNAMIC = {
    "int8_dynamic": Storage(dtype="int8", rounding="int8"),
    "int4_dynamic": Storage(dtype="int4", group_size=32, rounding="int8"),
}
MANY_EXPERTS = Mixture((1, ROWS // 4), WIDTH, 2048, 512, 2, STORED["int8"])
PAIRS = MANY_EXPERTS.pairs


def products(stored):
    """A product with many rows, and one with a very large matrix."""
    return [
        ("linear", (Linear((1, ROWS), WIDTH, WIDTH, stored, norm_eps=1e-5, residual=True),)),
        ("linear", (Linear((1, 1), VOCABULARY, WIDTH, stored, norm_eps=1e-5),)),
    ]


EVERYWHERE = [
    *(call for name in ("float16", "int8", "int4") for call in products(STORED[name])),
    ("linear", (Linear((1, ACTIVATION_LIMIT // VOCABULARY), VOCABULARY, WIDTH, STORED["float16"], swiglu=True),)),
    ("embedding", (Embedding((1, ROWS), VOCABULARY, WIDTH, STORED["int8"]),)),
    ("rms_norm", ((1, ROWS), WIDTH, 1e-5)),
    ("swiglu", ((1, ROWS), WIDTH // 2)),
    ("residual", ((1, ROWS, WIDTH),)),
    ("rotation", ((1, ROWS), 64, "cos")),
    ("mixture", (MANY_EXPERTS,)),
]
CALLS = [
    *((target, *call) for target in ("llvm", "cuda") for call in EVERYWHERE),
    *(("tensor-cores", op, arguments) for op, arguments in EVERYWHERE if op in ON_TENSOR_CORES),
    *(("llvm", *call) for stored in DYNAMIC.values() for call in products(stored)),
    ("cuda", "sample", (VOCABULARY,)),
]


# Bounds of the integers in memory, and of scalars that a loop carries on.
MEMORY = {
    "ids": (0, VOCABULARY - 1),
    "chosen": (0, MANY_EXPERTS.n_experts - 1),
    "count": (0, PAIRS),
    "members": (0, PAIRS - 1),
    "own": (0, PAIRS - 1),  # pairs of an expert before this one
    "at": (0, 1023),  # a bin, a lane or a thread of the block that draws
    "wanted": (0, VOCABULARY),
    "held": (0, VOCABULARY),
    "first": (0, VOCABULARY),
}


@pytest.mark.parametrize(("target", "op", "arguments"), CALLS)
def test_no_index_of_the_largest_calls_wraps(target, op, arguments):
    spec = SPECS[target]
    kernel = kernels_of(spec)[op](*arguments)
    assert wrapping(kernel, spec.kind, MEMORY) == []


@pytest.mark.parametrize("target", ["llvm", "tensor-cores"])
def test_ordinary_kernels_are_left_alone_and_do_not_wrap(target):
    """Just below the limit, everything is the maker's own int32 kernel, so no machine code changes, and none wraps."""
    spec = SPECS[target]
    shape = attention_shape((16, 32, 8, 128, NARROW_ELEMENTS // (16 * 8 * 128)), 16, "float16")
    kernel = kernels_of(spec)["rolling_attention"](shape)
    assert largest_buffer(kernel) > 0.99 * NARROW_ELEMENTS
    assert not any(str(size.ty.dtype) == "int64" for buffer in kernel.params for size in buffer.shape)
    assert wrapping(kernel, spec.kind, positions_of(shape)) == []


SMALL_ATTENTION = (2, 4, 2, 32, 48)
SMALL_MIXTURE = Mixture((1, 5), 64, 32, 4, 2, STORED["int8"])
SMALL = [
    ("rolling_attention", (attention_shape(SMALL_ATTENTION, 24, "float16"),)),
    ("linear", (Linear((1, 5), 96, 64, STORED["int4"], norm_eps=1e-5, residual=True),)),
    ("linear", (Linear((1, 1), 128, 64, STORED["int8"], swiglu=True),)),
    ("embedding", (Embedding((1, 5), 40, 64, STORED["int8"]),)),
    ("mixture", (SMALL_MIXTURE,)),
]


def arrays_of(kernel, rng):
    """Random arrays for a kernel's parameters."""
    arrays = []
    for buffer in kernel.params:
        shape, dtype = tuple(map(int, buffer.shape)), str(buffer.dtype)
        if buffer.name == "positions":
            array = np.arange(prod(shape)).reshape(shape) % shape[1] + 20
        elif buffer.name == "slots":
            array = np.arange(prod(shape))
        elif dtype == "uint16":
            array = rng.integers(0, 2**14, shape)
        elif dtype.startswith(("int", "uint")):
            array = rng.integers(0, 8, shape)
        else:
            array = rng.uniform(0.1, 1, shape)
        arrays.append(aligned(array.astype(dtype)))
    return arrays


@pytest.mark.parametrize("kind", ["llvm", "cuda"])
@pytest.mark.parametrize(("op", "arguments"), SMALL)
def test_a_widened_kernel_computes_the_same_bits(kind, op, arguments):
    kernel = CPU[op](level_of(AVX2), *arguments) if kind == "llvm" else CUDA[op](*arguments, on=SERIAL)
    results = []
    for made in (kernel, widened(kernel)):
        tensors = [tvm.runtime.tensor(array) for array in arrays_of(kernel, np.random.default_rng(0))]
        compiled_serially(made)(*tensors)  # which does not optimize, and so takes half the time
        results.append([tensor.numpy().tobytes() for tensor in tensors])
    assert results[0] == results[1]


def test_the_last_slot_of_a_long_cache_is_written_in_its_place():
    """The first token of the last of 33 slots; other rows are padding. In int32 it would be written into slot 0."""
    position, last = 0, LONG_CACHE[0] - 1
    shape = attention_shape(LONG_CACHE, 1, "int8")
    kernel = kernels_of(SPECS["llvm"])["rolling_attention"](shape)
    arrays = {
        buffer.name: untouched_memory(tuple(map(int, buffer.shape)), str(buffer.dtype)) for buffer in kernel.params
    }
    arrays["qkv"][:], arrays["cos"][:], arrays["positions"][:] = 1, 1, -1
    arrays["positions"][last], arrays["slots"][:] = position, np.arange(LONG_CACHE[0])
    compiled(kernel)(*(tvm.runtime.from_dlpack(array) for array in arrays.values()))
    columns = 64  # at the start of each slot's ring: wherever the column may have gone
    for name in ("values", "value_scales"):
        written = np.argwhere(arrays[name][:, :, :columns].any(axis=-1))
        written = np.unique(written // (1, 1, 2), axis=0)  # the numbers of two columns lie together
        assert written.tolist() == [[last, head, position // 2] for head in range(shape.n_kv_heads)]
    assert not arrays["keys"][:last, :, :columns].any()
    assert np.allclose(arrays["out"][last], 1)  # the only value
    assert not arrays["out"][:last].any()
