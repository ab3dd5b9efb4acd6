"""Targets: the kinds of machine that artifacts are made for, and what configuration, packing and boxes must know of each.

A new target is a row here, one of `runtime.engines.machines.MACHINES` (how a box loads and examines it), one of
`build.tvm_stage.target.TARGETS` (how TVM compiles for it) and a folder of `build/kernels/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

TargetKind = Literal["llvm", "cuda"]
StorageDType = Literal["fp32", "fp16", "bf16"]
CacheDType = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Target:
    """One kind of machine."""

    dtypes: tuple[StorageDType, ...]  # that `backend.dtype` may be, the default first
    caches: tuple[CacheDType, ...]  # that keys and values may be stored as
    layout: Literal["panels", "vectors"]  # of packed matrices: `runtime.artifact.layouts`
    rounds_activations: bool = False  # its kernels multiply int8 with int8
    archs: tuple[str, ...] = ()  # architectures that are compiled for by default; none where there is no choice
    on_device: bool = False  # weights and caches lie on a device of its own, not in the host's memory
    libraries: tuple[str, ...] = ()  # that a box loads beside TVM's runtime, in order
    packages: tuple[str, ...] = ()  # that these come from, beside TVM


TARGETS: Mapping[TargetKind, Target] = {
    "llvm": Target(
        dtypes=("fp32", "fp16", "bf16"), caches=("fp32", "fp16", "int8"), layout="panels", rounds_activations=True
    ),
    "cuda": Target(
        dtypes=("fp16", "fp32"),
        caches=("fp16", "fp32"),
        layout="vectors",
        archs=("sm_80", "sm_90a"),
        on_device=True,
        libraries=("libcudart.so.13", "libtvm_runtime_cuda.so"),
        packages=("nvidia-cuda-runtime",),
    ),
}
