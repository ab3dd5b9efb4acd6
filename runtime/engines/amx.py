"""Permission for AMX: Linux gives a process the registers of a tile, 8 kB of each thread's state, only on request.

See "Using XSTATE features in user space applications" of the Linux kernel's documentation (arch/x86/xstate).
"""

import ctypes
import platform
from functools import cache

from runtime.artifact.cpu import machine_features

AMX_FEATURES = frozenset(("amx_tile", "amx_int8", "amx_bf16"))
ARCH_PRCTL = 158  # the number of the system call on x86-64
ARCH_REQ_XCOMP_PERM = 0x1023
TILE_DATA = 18  # the number of the state component


@cache
def request_amx() -> bool:
    """Ask for the use of tiles in this process, once, before other threads start; False if there are none.

    The permission holds for all threads of the process and for its children.
    """
    if platform.machine() != "x86_64" or not machine_features() >= AMX_FEATURES:
        return False
    return ctypes.CDLL(None).syscall(ARCH_PRCTL, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0
