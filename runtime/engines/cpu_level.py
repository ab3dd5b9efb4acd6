"""Which of an artifact's CPU levels this process runs: the best that the machine has, or the one that was asked for."""

import os
from collections.abc import Sequence

from runtime.artifact.cpu import machine_features, missing_features
from runtime.artifact.manifest import CpuLevel
from runtime.engines.amx import AMX_FEATURES, request_amx
from runtime.errors import UserError

VARIABLE = "RUNTIME_CPU_LEVEL"


def chosen_level(levels: Sequence[CpuLevel]) -> CpuLevel:
    """The best of an artifact's levels that this machine can run; `levels` is as in `TargetSpec.levels`.

    The environment variable RUNTIME_CPU_LEVEL names another one. Raises `UserError` if the artifact has no such level,
    or if this process cannot run it.
    """
    name = os.environ.get(VARIABLE)
    if not name:
        found = next((level for level in reversed(levels) if not missing_of(level)), None)
        if found is None:
            raise UserError(
                f"this process may not use {', '.join(missing_of(levels[0]))}, which the artifact's lowest cpu level "
                f"{levels[0].cpu} needs; compile it for a lower level too, such as backend.cpu: [x86-64-v3, "
                f"{levels[0].cpu}]"
            )
        return found
    level = next((level for level in levels if level.cpu == name), None)
    if level is None:
        raise UserError(
            f"{VARIABLE} is {name!r}, but the artifact has the cpu levels {', '.join(each.cpu for each in levels)}; "
            f"name one of these, or unset {VARIABLE}"
        )
    if missing := missing_of(level):
        raise UserError(
            f"{VARIABLE} is {name}, but this machine lacks {', '.join(missing)}; name a lower level, or unset it"
        )
    return level


def missing_of(level: CpuLevel) -> tuple[str, ...]:
    """The flags that code for a level needs and that this process may not use."""
    needs_amx = not AMX_FEATURES.isdisjoint(level.features)  # which is requested only for code that has tiles
    return missing_features(level.features, usable_features() if needs_amx else machine_features())


def usable_features() -> frozenset[str]:
    """The flags of this machine that this process may use."""
    have = machine_features()
    return have if not have & AMX_FEATURES or request_amx() else have - AMX_FEATURES
