"""Targets: the TVM target of a configuration, its pass list, and the CPU features that the code needs. A new target is a row in `TARGETS`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.relax.backend.cpu_generic import pipeline as cpu_pipeline
from tvm.target import codegen

from build.compiler import tvm
from export.config import BackendConfig
from runtime.cpu import cpuinfo_flags
from runtime.errors import UserError
from runtime.manifest import TargetSpec

NATIVE = "native"


@dataclass(frozen=True)
class TargetRow:
    """How one kind of target is compiled for."""

    make: Callable[[TargetSpec], Any]  # to a TVM target
    passes: Callable[[Any], Sequence[tuple[str, Sequence[Any]]]]  # named groups of Relax passes, in order


def _llvm(spec: TargetSpec) -> Any:  # noqa: ANN401 (TVM's targets are untyped)
    return tvm.target.Target({"kind": "llvm", "mcpu": spec.cpu})


def _llvm_passes(target: Any) -> Sequence[tuple[str, Sequence[Any]]]:  # noqa: ANN401
    return (
        ("legalize", cpu_pipeline.legalize_passes(target)),  # what no kernel of ours computes: default loops, fused
        ("lower", cpu_pipeline.dataflow_lower_passes(target)),
        ("plan-memory", cpu_pipeline.finalize_passes(target)),
    )


TARGETS: dict[str, TargetRow] = {
    "llvm": TargetRow(_llvm, _llvm_passes),
}


def target_spec(backend: BackendConfig) -> TargetSpec:
    """Resolve a configured backend: `native` to this machine's CPU, and the CPU to the features that its code may use."""
    cpu = str(codegen.llvm_get_system_cpu()) if backend.cpu == NATIVE else backend.cpu
    known = {str(name) for name in codegen.llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm"}))}
    if cpu not in known:
        raise UserError(f"backend.cpu is {cpu!r}, which LLVM does not know; expected native, x86-64-v3 or another of LLVM's names, such as znver4")
    features = codegen.llvm_get_cpu_features(tvm.target.Target({"kind": "llvm", "mcpu": cpu}))
    flags = cpuinfo_flags([str(name) for name in features])
    return TargetSpec(kind=backend.target, dtype=backend.dtype, cpu=cpu, cpu_features=flags, arch=backend.arch)
