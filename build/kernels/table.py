"""The operations that kernels exist for, and which kernel serves which target. A new kernel is a file and a row here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tvm.tirx import PrimFunc

from build.kernels.cpu import attention, embedding, linear, mixture, norm, swiglu
from build.kernels.cuda import attention as cuda_attention
from build.kernels.cuda import embedding as cuda_embedding
from build.kernels.cuda import linear as cuda_linear
from build.kernels.cuda import mixture as cuda_mixture
from build.kernels.cuda import norm as cuda_norm
from build.kernels.cuda import swiglu as cuda_swiglu


@dataclass(frozen=True)
class KernelSet:
    """One target's kernels, by operation; every target has every operation, with the same arguments."""

    panel: int  # neighbouring outputs stored together: a (N, K) weight is packed as (ceil(N / panel), K, panel)
    kernels: Mapping[str, Callable[..., PrimFunc]]


# op                 computes
# rolling_attention  split, rotate, attend, write the ring
# embedding          one row of a matrix per token
# rms_norm           x / rms(x) * weight
# swiglu             silu(gate) * up
# linear             x W^T
# mixture            each token's best experts, weighted
KERNELS: dict[str, KernelSet] = {
    "llvm": KernelSet(
        linear.PANEL,
        {
            "rolling_attention": attention.rolling_attention,
            "embedding": embedding.embedding,
            "rms_norm": norm.rms_norm,
            "swiglu": swiglu.swiglu,
            "linear": linear.linear,
            "mixture": mixture.mixture,
        },
    ),
    "cuda": KernelSet(
        cuda_linear.PANEL,
        {
            "rolling_attention": cuda_attention.rolling_attention,
            "embedding": cuda_embedding.embedding,
            "rms_norm": cuda_norm.rms_norm,
            "swiglu": cuda_swiglu.swiglu,
            "linear": cuda_linear.linear,
            "mixture": cuda_mixture.mixture,
        },
    ),
}
