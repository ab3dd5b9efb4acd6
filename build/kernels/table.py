"""The operations that have kernels, and the kernels of each target. A new kernel is a file and a row here."""

from collections.abc import Callable, Mapping
from functools import partial

from tvm.tirx import PrimFunc

from build.kernels.cpu import embedding, linear, mixture, norm, residual, rotation, swiglu
from build.kernels.cpu.attention import kernel as cpu_attention
from build.kernels.cpu.level import level_of
from build.kernels.cuda import attention as cuda_attention
from build.kernels.cuda import embedding as cuda_embedding
from build.kernels.cuda import linear as cuda_linear
from build.kernels.cuda import mixture as cuda_mixture
from build.kernels.cuda import norm as cuda_norm
from build.kernels.cuda import residual as cuda_residual
from build.kernels.cuda import rotation as cuda_rotation
from build.kernels.cuda import sample as cuda_sample
from build.kernels.cuda import swiglu as cuda_swiglu
from build.kernels.wide_index import kernels_with_fitting_indices
from runtime.artifact.manifest import TargetSpec
from runtime.artifact.targets import TargetKind

Kernels = Mapping[str, Callable[..., PrimFunc]]  # by operation

# op                 computes
# rolling_attention  split, rotate, attend, write the ring
# embedding          one row of a matrix per token
# rms_norm           x / rms(x) * weight
# swiglu             silu(gate) * up
# residual           a + b
# rotation           cos or sin of the rotary angles
# linear             x W^T, with the operations fused around it
# mixture            weighted sum of each token's best experts
# sample             the next id from logits; only for targets whose host would have to wait for the logits
CPU: dict[str, Callable[..., PrimFunc]] = {
    "rolling_attention": cpu_attention.rolling_attention,
    "embedding": embedding.embedding,
    "rms_norm": norm.rms_norm,
    "swiglu": swiglu.swiglu,
    "residual": residual.residual,
    "rotation": rotation.rotation,
    "linear": linear.linear,
    "mixture": mixture.mixture,
}
CUDA: dict[str, Callable[..., PrimFunc]] = {
    "rolling_attention": cuda_attention.rolling_attention,
    "embedding": cuda_embedding.embedding,
    "rms_norm": cuda_norm.rms_norm,
    "swiglu": cuda_swiglu.swiglu,
    "residual": cuda_residual.residual,
    "rotation": cuda_rotation.rotation,
    "linear": cuda_linear.linear,
    "mixture": cuda_mixture.mixture,
    "sample": cuda_sample.sample,
}
WARPGROUP_ARCH = "sm_90a"  # whose code runs on no other architecture
ON_TENSOR_CORES = ("rolling_attention", "linear", "mixture")  # these may round activations to float16


def _cpu_kernels(target: TargetSpec) -> Kernels:
    """Kernels for the best level that the processor supports."""
    level = level_of(target.cpu_features)
    return {op: partial(maker, level) for op, maker in CPU.items()}


def _cuda_kernels(target: TargetSpec) -> Kernels:
    """Kernels for CUDA, on tensor cores where the model is float16, and on those of warpgroups where all have them."""
    if target.dtype != "fp16":
        return CUDA
    kernels = CUDA | {op: partial(CUDA[op], tensor_cores=True) for op in ON_TENSOR_CORES}
    if set(target.arch) == {WARPGROUP_ARCH}:
        kernels["linear"] = partial(kernels["linear"], warpgroups=True)
    return kernels


KERNELS: Mapping[TargetKind, Callable[[TargetSpec], Kernels]] = {"llvm": _cpu_kernels, "cuda": _cuda_kernels}


def kernels_of(target: TargetSpec) -> Kernels:
    """Kernels for one target, chosen by what its lowest CPU level can do; very large buffers are indexed by int64."""
    return kernels_with_fitting_indices(KERNELS[target.kind](target))
