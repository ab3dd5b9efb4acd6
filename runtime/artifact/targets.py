"""Targets: the kinds of machine that artifacts are made for, and what configuration, packing and boxes know of each.

A new target is a row here, a row of `runtime.engines.machines.MACHINES` (how a box loads and examines it), a row of
`build.tvm_stage.target.TARGETS` (how TVM compiles for it) and a folder of `build/kernels/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TargetKind = Literal["llvm", "cuda"]
StorageDType = Literal["fp32", "fp16", "bf16"]
CacheDType = Literal["fp32", "fp16", "fp8", "int8", "int4"]


@dataclass(frozen=True)
class Target:
    """One kind of machine."""

    dtypes: tuple[StorageDType, ...]  # allowed values of `backend.dtype`, the default first
    caches: tuple[CacheDType, ...]  # dtypes in which keys and values may be stored
    layout: Literal["panels", "vectors"]  # of packed matrices: `runtime.artifact.layouts`
    most_rows: int  # of the largest step that is compiled by default
    rounds_activations: bool = False  # its kernels multiply whole numbers by whole numbers
    # A token's results are the same bits whichever function computes them, among whatever other rows and chunks.
    same_bits_in_any_call: bool = False
    cpus: tuple[str, ...] = ("x86-64-v3",)  # LLVM's names of the CPU levels compiled for by default, the lowest first
    archs: tuple[str, ...] = ()  # architectures compiled for by default; empty if there is no choice
    on_device: bool = False  # weights and caches are in a device's own memory, not in the host's
    libraries: tuple[str, ...] = ()  # libraries that a box loads in addition to TVM's runtime, in order
    packages: tuple[str, ...] = ()  # packages that contain them, in addition to TVM


TARGETS: Mapping[TargetKind, Target] = {
    "llvm": Target(
        dtypes=("fp32", "fp16", "bf16"),
        caches=("fp32", "fp16", "fp8", "int8", "int4"),
        layout="panels",
        most_rows=16,
        same_bits_in_any_call=True,
        rounds_activations=True,
        cpus=("x86-64-v3", "alderlake", "x86-64-v4", "znver4", "sapphirerapids"),
    ),
    "cuda": Target(
        dtypes=("fp16", "fp32"),
        caches=("fp16", "fp32", "fp8", "int8", "int4"),
        layout="vectors",
        most_rows=128,
        archs=("sm_80", "sm_90a"),
        on_device=True,
        libraries=("libcudart.so.13", "libtvm_runtime_cuda.so"),
        packages=("nvidia-cuda-runtime",),
    ),
}
