"""Levels of code that one artifact holds: the best that this machine has, or one that is forced."""

from collections.abc import Sequence

from build.bench.contenders import BEST
from build.kernels.cpu.level import Level, level_of, runnable_levels
from build.tvm_stage.cpu_levels import cpu_levels
from runtime.artifact.manifest import CpuLevel
from runtime.engines.cpu_level import missing_of
from runtime.errors import UserError


def kernel_level(name: str) -> Level:
    """The level of the kernels in code for a processor that LLVM knows by this name, or the best of this machine.

    Raises `UserError` for a name that LLVM does not know, and for a processor whose code this machine cannot run.
    """
    if name == BEST:
        return runnable_levels()[0]
    [found] = cpu_levels([name])
    if missing := missing_of(found):
        raise UserError(f"--levels names {name}, but this machine lacks {', '.join(missing)}; name a lower level")
    return level_of(found.features)


def distinct_levels(names: Sequence[str]) -> tuple[str, ...]:
    """The names without those whose kernels are the same as those of one before."""
    first: dict[str, str] = {}
    for name in names:
        first.setdefault(kernel_level(name).name, name)
    return tuple(first.values())


def held_levels(names: Sequence[str], held: Sequence[CpuLevel]) -> list[str]:
    """The names of levels that an artifact holds: one at which no kernel differs from a lower level's is left out."""
    known = {level.cpu for level in held}
    return [name for name in names if name == BEST or name in known]
