"""How much memory this process has used, as counted by the kernel."""

from pathlib import Path

STATUS = Path("/proc/self/status")
KIBIBYTE = 1024  # the kernel writes it as kB


def peak_memory() -> int:
    """Peak resident memory of this process in bytes since its program was loaded, including mapped file pages it read.

    It is the kernel's own high-water mark (VmHWM), so nothing is sampled and nothing is missed. Unlike getrusage, it
    leaves out what the process that started this one held before `exec`.
    """
    (size,) = (int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return size * KIBIBYTE
