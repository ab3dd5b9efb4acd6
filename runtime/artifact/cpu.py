"""Which x86-64 code this machine can run: psABI levels, /proc/cpuinfo flags, and the check before a library is loaded.

The levels are those of the x86-64 psABI (https://gitlab.com/x86-psABIs/x86-64-ABI, "Micro-Architecture Levels"),
written with the names that Linux prints in /proc/cpuinfo: SSE3 is `pni`, LZCNT is `abm`, BMI1 is `bmi1`, LAHF-SAHF is
`lahf_lm`, and so on.
"""

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import UserError

CPUINFO = Path("/proc/cpuinfo")


@dataclass(frozen=True)
class PsabiLevel:
    """One psABI level: LLVM's name for it, and every /proc/cpuinfo flag that code for it may use."""

    name: str
    flags: tuple[str, ...]


_V1 = ("lm", "fpu", "cmov", "cx8", "fxsr", "mmx", "sse", "sse2")
_V2 = (*_V1, "cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2")
_V3 = (*_V2, "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave")
_V4 = (*_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")

LEVELS: dict[str, PsabiLevel] = {  # ascending: each includes the one before it
    level.name: level
    for level in (
        PsabiLevel("x86-64", _V1),
        PsabiLevel("x86-64-v2", _V2),
        PsabiLevel("x86-64-v3", _V3),
        PsabiLevel("x86-64-v4", _V4),
    )
}

# Maps LLVM's names of the features that its code generator uses of its own accord (tuning hints and system instructions
# are left out) to the flag that Linux shows for each.
LLVM_TO_CPUINFO: dict[str, str] = {
    "64bit": "lm",
    "x87": "fpu",
    "cmov": "cmov",
    "cx8": "cx8",
    "cx16": "cx16",
    "fxsr": "fxsr",
    "mmx": "mmx",
    "sse": "sse",
    "sse2": "sse2",
    "sse3": "pni",
    "ssse3": "ssse3",
    "sse4.1": "sse4_1",
    "sse4.2": "sse4_2",
    "sse4a": "sse4a",
    "crc32": "sse4_2",  # the CRC32 instruction came with SSE4.2 and has no flag of its own
    "popcnt": "popcnt",
    "sahf": "lahf_lm",
    "xsave": "xsave",
    "avx": "avx",
    "avx2": "avx2",
    "fma": "fma",
    "fma4": "fma4",
    "xop": "xop",
    "f16c": "f16c",
    "bmi": "bmi1",
    "bmi2": "bmi2",
    "tbm": "tbm",
    "lzcnt": "abm",
    "movbe": "movbe",
    "gfni": "gfni",
    "avxvnni": "avx_vnni",
    "avxifma": "avx_ifma",
    "avx512f": "avx512f",
    "avx512bw": "avx512bw",
    "avx512cd": "avx512cd",
    "avx512dq": "avx512dq",
    "avx512vl": "avx512vl",
    "avx512ifma": "avx512ifma",
    "avx512vbmi": "avx512vbmi",
    "avx512vbmi2": "avx512_vbmi2",
    "avx512vnni": "avx512_vnni",
    "avx512bitalg": "avx512_bitalg",
    "avx512vpopcntdq": "avx512_vpopcntdq",
    "avx512bf16": "avx512_bf16",
    "avx512fp16": "avx512_fp16",
    "amx-tile": "amx_tile",
    "amx-int8": "amx_int8",
    "amx-bf16": "amx_bf16",
}


def machine_features(cpuinfo: Path = CPUINFO) -> frozenset[str]:
    """The flags that every processor of this machine has; empty if there is no `flags` line (not x86, not Linux)."""
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    lines = [
        value.split() for key, _, value in (line.partition(":") for line in text.splitlines()) if key.strip() == "flags"
    ]
    return frozenset.intersection(*map(frozenset, lines)) if lines else frozenset()


def missing_features(required: Iterable[str], features: frozenset[str] | None = None) -> tuple[str, ...]:
    """The `required` flags that `features` (default: this machine's) lacks, in the order of `required`."""
    have = machine_features() if features is None else features
    return tuple(flag for flag in required if flag not in have)


def best_level(features: frozenset[str] | None = None) -> str:
    """The highest level that `features` (default: this machine's) covers; raises `UserError` below x86-64."""
    have = machine_features() if features is None else features
    fitting = [level.name for level in LEVELS.values() if not missing_features(level.flags, have)]
    if not fitting:
        raise UserError(
            f"this machine ({platform.machine()}) supports none of the levels {', '.join(LEVELS)}; "
            "only x86-64 processors are supported"
        )
    return fitting[-1]


def cpuinfo_flags(llvm_features: Iterable[str]) -> tuple[str, ...]:
    """The /proc/cpuinfo flags that code for a CPU with these LLVM features may need, sorted.

    They become `TargetSpec.cpu_features`.
    """
    return tuple(sorted({LLVM_TO_CPUINFO[name] for name in llvm_features if name in LLVM_TO_CPUINFO}))


def check_cpu(required: Iterable[str], cpu_name: str, features: frozenset[str] | None = None) -> None:
    """Raise `UserError` unless `features` (default: this machine's) has every flag that code for `cpu_name` needs."""
    have = machine_features() if features is None else features
    missing = missing_features(required, have)
    if not missing:
        return
    if not have:
        raise UserError(
            f"this machine is {platform.machine()} and shows no x86 CPU flags in {CPUINFO}, "
            f"but the artifact was compiled for the cpu level {cpu_name}; run it on an x86-64 machine with Linux"
        )
    named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
    raise UserError(
        f"this machine lacks {named}, which the artifact's cpu level {cpu_name} needs; "
        f"compile again with backend.cpu: {best_level(have)}"
    )
