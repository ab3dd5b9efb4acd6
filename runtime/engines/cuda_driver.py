"""The CUDA driver's view of this machine, queried through libcuda.so.1 itself: no toolkit, no other package.

The functions and numbers are those of the CUDA Driver API (https://docs.nvidia.com/cuda/cuda-driver-api/).
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import UserError

DRIVER = "libcuda.so.1"
OLDEST_DRIVER = 13000  # CUDA 13.0 (driver R580), whose runtime library ships with the artifacts
CAPABILITY_MAJOR, CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute


@dataclass(frozen=True)
class Device:
    """One GPU. `capability` is (9, 0) for sm_90; `memory` is in bytes."""

    name: str
    capability: tuple[int, int]
    memory: int

    def runs(self, arch: str) -> bool:
        """Whether machine code for `arch` runs here.

        Code runs on devices of its own generation that are no older; code for a name with an a, on this exact
        capability only.
        """
        number = arch.removeprefix("sm_").rstrip("af")
        major, minor = int(number[:-1]), int(number[-1])
        if arch.endswith("a"):
            return (major, minor) == self.capability
        return major == self.capability[0] and minor <= self.capability[1]


@dataclass(frozen=True)
class Driver:
    """A working driver: the CUDA version that it supports (13000 is 13.0), and its devices."""

    version: int
    devices: tuple[Device, ...]


def read_driver() -> Driver:
    """Query the driver; raises `UserError` if there is none, or if it does not work."""
    try:
        library = ctypes.CDLL(DRIVER)
        start = library.cuInit
    except (OSError, AttributeError) as error:
        raise UserError(
            f"no CUDA driver found: {DRIVER} cannot be loaded ({error}); install NVIDIA's driver R580 or newer "
            "(in a container: start it with the GPU), or compile with backend.target: llvm"
        ) from error
    _check(library, start(0))
    version, count = ctypes.c_int(), ctypes.c_int()
    _check(library, library.cuDriverGetVersion(ctypes.byref(version)))
    _check(library, library.cuDeviceGetCount(ctypes.byref(count)))
    return Driver(version.value, tuple(_device(library, i) for i in range(count.value)))


def _device(library: ctypes.CDLL, index: int) -> Device:
    handle, number, memory, name = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t(), ctypes.create_string_buffer(256)
    _check(library, library.cuDeviceGet(ctypes.byref(handle), index))
    _check(library, library.cuDeviceGetName(name, len(name), handle))
    capability = []
    for attribute in (CAPABILITY_MAJOR, CAPABILITY_MINOR):
        _check(library, library.cuDeviceGetAttribute(ctypes.byref(number), attribute, handle))
        capability.append(number.value)
    _check(library, library.cuDeviceTotalMem_v2(ctypes.byref(memory), handle))
    return Device(name.value.decode(errors="replace"), (capability[0], capability[1]), memory.value)


def _check(library: ctypes.CDLL, status: int) -> None:
    if status == 0:
        return
    text = ctypes.c_char_p()
    library.cuGetErrorString(status, ctypes.byref(text))
    reason = (text.value or b"unknown error").decode(errors="replace")
    raise UserError(
        f"the CUDA driver reports error {status} ({reason}), expected a working GPU; see what `nvidia-smi` says"
    )


def check_driver(driver: Driver, archs: Sequence[str]) -> Device:
    """The first device, which must run machine code for one of `archs`; raises `UserError` with what is missing."""
    if driver.version < OLDEST_DRIVER:
        raise UserError(
            f"the CUDA driver supports CUDA {version_text(driver.version)}, "
            f"expected {version_text(OLDEST_DRIVER)} or newer; install driver R580 or newer"
        )
    if not driver.devices:
        raise UserError(
            "the CUDA driver found no GPU; see what `nvidia-smi` says, and whether CUDA_VISIBLE_DEVICES hides it"
        )
    device = driver.devices[0]
    if not any(device.runs(arch) for arch in archs):
        own = "sm_{}{}".format(*device.capability)
        raise UserError(
            f"{device.name} is {own}, but the artifact has machine code for {', '.join(archs)}; "
            f"compile it with backend.arch: [{own}]"
        )
    return device


def version_text(version: int) -> str:
    """The version in the usual form: 13.0 for 13000."""
    return f"{version // 1000}.{version % 1000 // 10}"
