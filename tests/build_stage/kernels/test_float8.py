"""8-bit floats (e4m3) as kernels of every target round and read them, against torch and ml_dtypes."""

import ml_dtypes
import numpy as np
from tvm.script import tirx as T

from build.kernels.cuda import float8_pairs
from build.kernels.cuda.binding import GPU
from build.kernels.cuda.mma import member
from build.kernels.float8 import from_e4m3, to_e4m3
from tests.emulator.gpu import Run
from tests.helpers.float8_numbers import FINITE, hard_numbers, rounded
from tests.helpers.kernels import EmulatedGpu, compiled, run

THREADS = 64


def rounding(count, on=GPU):
    """Kernel from float32 to the bits of e4m3."""

    @T.prim_func
    def kernel(x: T.Buffer((count,), "float32"), out: T.Buffer((count,), "uint8")):
        T.func_attr({"tirx.noalias": True})
        for _block in on.blocks(1):
            for t in on.threads(THREADS):
                for i in T.serial(count // THREADS):
                    out[i * THREADS + t] = to_e4m3(x[i * THREADS + t])

    return kernel


def rounding_in_registers(count):
    """The same kernel for a CPU, with 16 numbers at once."""

    @T.prim_func
    def kernel(x: T.Buffer((count,), "float32"), out: T.Buffer((count,), "uint8")):
        T.func_attr({"tirx.noalias": True})
        for i in T.serial(count // 16):
            for v in T.vectorized(16):
                out[i * 16 + v] = to_e4m3(x[i * 16 + v])

    return kernel


def widening(count, on=GPU):
    """Kernel from words of four to their numbers, each read by itself and as one of a pair."""
    neighbours = float8_pairs.neighbours(on)

    @T.prim_func
    def kernel(
        words: T.Buffer((count,), "uint32"),
        single: T.Buffer((count, 4), "float32"),
        paired: T.Buffer((count, 4), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for _block in on.blocks(1):
            for t in on.threads(count):
                for i in T.unroll(4):
                    word = words[t] >> T.Cast("uint32", 8 * i)
                    single[t, i] = from_e4m3(T.Cast("uint8", word & T.uint32(0xFF)))
                    paired[t, i] = member(neighbours(words[t] >> T.Cast("uint32", i // 2 * 16)), i % 2)

    return kernel


def check_rounding(found, x):
    known = ~np.isnan(x)
    np.testing.assert_array_equal(found[known], rounded(x[known]))
    assert set(found[~known] & 0x7F) == {0x7E}  # 448 stands for what is not a number


def test_rounding_is_that_of_torch(gpu):
    x = hard_numbers(THREADS)
    *_, found = gpu.run(gpu.compiled(rounding, len(x)), x, np.zeros(len(x), np.uint8))
    check_rounding(found, x)


def test_rounding_is_that_of_torch_in_registers(width):
    x = hard_numbers(THREADS)
    *_, found = run(compiled(rounding_in_registers(len(x)), width), x, np.zeros(len(x), np.uint8))
    check_rounding(found, x)


def test_every_number_is_read_exactly(gpu):
    check_widening(gpu)


def test_every_number_is_read_exactly_by_the_instruction_for_pairs(gpu_process, monkeypatch):
    """As on sm_89 and later: the emulated GPU compiles what is for others."""
    source = float8_pairs.SOURCE.replace("defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890", "true")
    monkeypatch.setattr(float8_pairs, "SOURCE", source.replace("return by_bits", "#error"))
    check_widening(EmulatedGpu(gpu_process, [Run()]))


def check_widening(gpu):
    bits = np.concatenate([FINITE, FINITE[:2]])  # whole words
    words = bits.view(np.uint32)
    outs = [np.zeros((len(words), 4), np.float32) for _ in range(2)]
    _, *found = gpu.run(gpu.compiled(widening, len(words)), words, *outs)
    for numbers in found:
        np.testing.assert_array_equal(numbers.ravel(), bits.view(ml_dtypes.float8_e4m3fn).astype(np.float32))
