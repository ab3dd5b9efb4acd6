"""Targets: the TVM target of a configuration, its list of passes, and the CPU features that the code needs.

A new target is a row in `TVM_TARGETS`.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from build.compiler import llvm_target, relax, tvm
from build.tvm_stage import cuda
from build.tvm_stage.cpu_levels import attributes_of, cpu_levels
from build.tvm_stage.machine_code import check_machine_code
from export.configuration.config import BackendConfig
from runtime.artifact.manifest import KernelUsage, TargetSpec
from runtime.artifact.targets import TargetKind


@dataclass(frozen=True)
class TvmTarget:
    """How one kind of target is compiled for."""

    make: Callable[[TargetSpec], Any]  # returns a TVM target
    passes: Callable[[], Sequence[tuple[str, Sequence[Any]]]]  # named groups of Relax passes, in order
    # Open while TVM compiles; takes the library's folder and the dump folder.
    toolchain: Callable[[TargetSpec, Path, Path | None], AbstractContextManager[None]]
    check: Callable[[Path, TargetSpec], None]  # checks the library; raises UserError
    skipped: tuple[str, ...] = ()  # TVM passes that are disabled
    tools: tuple[str, ...] = ()  # distributions besides TVM whose versions its libraries depend on
    # Resource usage of the kernels, from the library's folder.
    usage: Callable[[Path], tuple[KernelUsage, ...]] = lambda _library: ()


def _llvm(spec: TargetSpec) -> Any:  # noqa: ANN401 (TVM's targets are untyped)
    return llvm_target(spec.cpu, mattr=attributes_of(spec.levels[0]))


def _cuda(spec: TargetSpec) -> Any:  # noqa: ANN401
    # TVM's schedules do not know sm_90a; nvcc compiles their code for every listed architecture.
    arch = spec.arch[0].removesuffix("a")
    return tvm.target.Target({"kind": "cuda", "arch": arch}, host=_llvm(spec))


def _legalize() -> list[Any]:
    """Give every operation that none of our kernels computes its default loops, and fuse neighbours."""
    t = relax.transform
    return [t.LegalizeOps(), t.AnnotateTIROpPattern(), t.FoldConstant(), t.FuseOps(), t.FuseTIR()]


def _schedule() -> Any:  # noqa: ANN401
    """Bind loops outside our kernels to blocks and threads; functions marked as scheduled stay as they are."""
    dlight, gpu = tvm.s_tir.dlight, tvm.s_tir.dlight.gpu
    return dlight.ApplyDefaultSchedule(
        gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()
    )


def _lower() -> list[Any]:
    """Turn dataflow into ordered calls.

    TVM's RewriteDataflowReshape is left out: it fails on kernels written as plain loops.
    """
    t = relax.transform
    return [t.ToNonDataflow(), t.RemovePurityChecking(), t.CallTIRRewrite()]


ARGUMENT_CHECKS = ("vm.builtin.check_tensor_info", "vm.builtin.match_shape")


def _without_argument_checks(module: tvm.IRModule, _context: tvm.transform.PassContext) -> tvm.IRModule:
    """Leave out TVM's checks of every argument in every call: hundreds of instructions, each with a message of its own.

    The engine, which alone calls these functions, has compared its arrays with the manifest when it opened.
    """
    result = tvm.IRModule(module.functions, attrs=module.attrs)
    for name, function in module.functions_items():
        if isinstance(function, relax.Function):
            blocks = [
                relax.BindingBlock([b for b in block.bindings if not _checks_arguments(b)])
                for block in function.body.blocks
            ]
            body = relax.SeqExpr(blocks, function.body.body)
            result.update_func(
                name, relax.Function(function.params, body, function.ret_ty, function.is_pure, function.attrs)
            )
    return result


def _checks_arguments(binding: relax.Binding) -> bool:
    op = getattr(getattr(binding, "value", None), "op", None)
    return isinstance(op, relax.ExternFunc) and op.global_symbol in ARGUMENT_CHECKS


def _plan_memory() -> list[Any]:
    """Reuse the storage of activations and lower to the virtual machine's built-ins."""
    t = relax.transform
    return [
        t.StaticPlanBlockMemory(),
        t.LowerAllocTensor(),
        t.KillAfterLastUse(),
        t.LowerRuntimeBuiltin(),
        t.ComputePrimValue(),
        t.VMShapeLower(emit_err_ctx=False),
        tvm.transform.module_pass(_without_argument_checks, opt_level=0),
        t.AttachGlobalSymbol(),
    ]


def _llvm_passes() -> Sequence[tuple[str, Sequence[Any]]]:
    return (("legalize", _legalize()), ("lower", _lower()), ("plan-memory", _plan_memory()))


def _cuda_passes() -> Sequence[tuple[str, Sequence[Any]]]:
    return (("legalize", [*_legalize(), _schedule()]), ("lower", _lower()), ("plan-memory", _plan_memory()))


def _no_toolchain(_spec: TargetSpec, _folder: Path, _dump: Path | None) -> AbstractContextManager[None]:
    return nullcontext()


def _check_host_only(_library: Path, _spec: TargetSpec) -> None:
    """Accept any library: host code runs as it is."""


def _check_cuda(library: Path, spec: TargetSpec) -> None:
    check_machine_code(library, spec.arch)


# This pass finds the part of each buffer that is used, which in our kernels is all of it, and takes three quarters of
# a compile's time; the machine code of every kernel is the same without it. TVM's own GPU schedules need it: they cut
# buffers down to one thread's part.
COMPACT = "s_tir.CompactBufferAllocation"

TVM_TARGETS: Mapping[TargetKind, TvmTarget] = {
    "llvm": TvmTarget(_llvm, _llvm_passes, _no_toolchain, _check_host_only, skipped=(COMPACT,)),
    "cuda": TvmTarget(_cuda, _cuda_passes, cuda.toolchain, _check_cuda, tools=cuda.PACKAGES, usage=cuda.usage_of),
}


def target_spec(backend: BackendConfig) -> TargetSpec:
    """Resolve a configured backend: `native` to this machine's CPU, and each CPU to the features its code may use."""
    return TargetSpec.of(cpu_levels(backend.cpu), kind=backend.target, dtype=backend.dtype, arch=backend.arch)
