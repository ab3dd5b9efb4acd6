"""A file in memory that nothing can change: what is loaded is what was hashed, whoever can write to the disk."""

import errno
import fcntl
import hashlib
import os
from pathlib import Path

from runtime.artifact.manifest import FileEntry
from runtime.errors import UserError

SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
MFD_EXEC = 0x10  # since Linux 6.3: says that code is run from it; older kernels refuse the flag and always allow that
COPY_BYTES = 2**20


def sealed_copy(path: Path, entry: FileEntry) -> Path:
    """Copy a file into sealed memory and return a path that this process can load it from.

    The copy stays for the life of the process: the loader knows a library by its path, so none may come twice. Raises
    `UserError` if the copy does not have the sum of `entry`, and if this system does not run code from memory.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        descriptor = _created(path.name, flags)
    except OSError as error:
        raise UserError(
            f"this system does not let a program run from memory ({error.strerror}), from which {path} is loaded; "
            "allow memfd_create, and set the sysctl vm.memfd_noexec to 0 or 1"
        ) from error
    with path.open("rb", buffering=0) as source, os.fdopen(descriptor, "wb", closefd=False, buffering=0) as copy:
        while block := source.read(COPY_BYTES):
            copy.write(block)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    with os.fdopen(os.dup(descriptor), "rb") as sealed:
        sealed.seek(0)
        found = hashlib.file_digest(sealed, "sha256").hexdigest()
    if found != entry.sha256:
        os.close(descriptor)
        raise UserError(
            f"{path} is damaged: it has SHA-256 {found[:16]}..., but the manifest says {entry.sha256[:16]}...; "
            "copy the artifact again or compile it again"
        )
    return Path(f"/proc/self/fd/{descriptor}")


def _created(name: str, flags: int) -> int:
    try:
        return os.memfd_create(name, flags | MFD_EXEC)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.memfd_create(name, flags)
