"""How much memory this process has had, as the kernel counted it."""

from pathlib import Path

STATUS = Path("/proc/self/status")
KIBIBYTE = 1024  # what the kernel writes as kB


def peak_memory() -> int:
    """Largest resident memory, in bytes, that this process has had since its program was loaded; pages of mapped files that were read count.

    The kernel's own high-water mark (VmHWM), so nothing is sampled and nothing is missed. Unlike getrusage, it leaves out what the process that
    started this one held before `exec`.
    """
    (size,) = (int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return size * KIBIBYTE
