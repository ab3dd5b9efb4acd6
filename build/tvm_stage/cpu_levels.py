"""The CPU levels of a configuration: LLVM's names of processors, the features that code may use, and their order."""

from collections.abc import Sequence

from build.compiler import codegen, tvm
from build.kernels.cpu.level import LEVELS, level_of, runnable_levels
from runtime.artifact.cpu import cpuinfo_flags
from runtime.artifact.manifest import CpuLevel
from runtime.engines.cpu_level import missing_of
from runtime.errors import UserError

NATIVE = "native"
# Instructions of one vendor's processors, which our kernels have no use for. Without them, code for znver4 runs on any
# processor that has its other features.
VENDORS_OWN = ("sse4a", "fma4", "xop", "tbm")


def cpu_levels(names: Sequence[str]) -> tuple[CpuLevel, ...]:
    """The levels by these names, from the lowest on; raises `UserError` for a name that LLVM does not know.

    Of levels that our kernels treat alike, the one with the fewest features is the lowest.
    """
    cpus = dict.fromkeys(native_cpu() if name == NATIVE else name for name in names)
    return tuple(
        sorted(map(_level_of, cpus), key=lambda level: (-LEVELS.index(level_of(level.features)), len(level.features)))
    )


def native_cpu() -> str:
    """LLVM's name of this machine's best level.

    LLVM knows processors by their model numbers, which virtual machines change. If the one that it names has not the
    level that the machine's flags allow, the answer is the processor that this level's kernels are written for.
    """
    detected, best = _level_of(str(codegen.llvm_get_system_cpu())), runnable_levels()[0]
    return detected.cpu if level_of(detected.features) is best and not missing_of(detected) else best.cpu


def _level_of(cpu: str) -> CpuLevel:
    known = {str(name) for name in codegen.llvm_get_cpu_archlist(tvm.target.Target({"kind": "llvm"}))}
    if cpu not in known:
        raise UserError(
            f"backend.cpu names {cpu!r}, which LLVM does not know; expected native, x86-64-v3 "
            "or another CPU name of LLVM, such as znver4"
        )
    features = codegen.llvm_get_cpu_features(tvm.target.Target({"kind": "llvm", "mcpu": cpu}))
    return CpuLevel(cpu=cpu, features=cpuinfo_flags([str(name) for name in features if name not in VENDORS_OWN]))


def attributes_of(level: CpuLevel) -> list[str]:
    """Attributes of LLVM for a level's code: those of its kernels' level, and no instruction of `VENDORS_OWN`."""
    return [*(f"-{feature}" for feature in VENDORS_OWN), *level_of(level.features).attributes]
