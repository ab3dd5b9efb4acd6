"""How much memory this process has used, and how much there is, as counted by the kernel."""

from pathlib import Path

STATUS, MEMORY = Path("/proc/self/status"), Path("/proc/meminfo")
GROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of a container, if it has one
KIBIBYTE = 1024  # the kernel writes it as kB


def peak_memory() -> int:
    """Peak resident memory of this process in bytes since its program was loaded, including mapped file pages it read.

    It is the kernel's own high-water mark (VmHWM), so nothing is sampled and nothing is missed. Unlike getrusage, it
    leaves out what the process that started this one held before `exec`.
    """
    (size,) = (int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return size * KIBIBYTE


def machine_memory() -> int:
    """Bytes of memory that this machine, or the container that this process runs in, has in all."""
    (total,) = (int(line.split()[1]) * KIBIBYTE for line in MEMORY.read_text().splitlines() if line[:9] == "MemTotal:")
    limit = GROUP_LIMIT.read_text().strip() if GROUP_LIMIT.is_file() else "max"
    return min(total, int(limit)) if limit.isdecimal() else total
