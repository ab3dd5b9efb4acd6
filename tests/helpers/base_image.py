"""A base image from this machine's own Python and tools, as no registry of images can be reached from a test.

It has what `python:...-slim-bookworm` has and `deploy/container/Dockerfile` needs: Python with venv, a shell, the tools
of `install.sh`, and the shared libraries of all of them.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

TOOLS = (
    *("awk", "base64", "basename", "cat", "dirname", "env", "find", "grep", "head", "mktemp", "openssl", "rm", "sed"),
    *("sh", "sha256sum", "sort", "tail"),
)
# of the C++ library that TVM's runtime is linked with, and of TLS, which every image of Python has
LIBRARIES = ("libstdc++.so.6", "libgcc_s.so.1", "libdl.so.2", "libpthread.so.0", "librt.so.1")
FOLDERS = ("dev", "etc", "proc", "run", "tmp", "usr/bin", "usr/lib", "usr/local/bin", "usr/local/lib", "var/tmp")
LEFT_OUT = ("__pycache__", "config-*", "idlelib", "lib2to3", "*-packages", "test", "tests", "tkinter", "turtledemo")
DEBIAN_WHEELS = Path("/usr/share/python-wheels")  # of Debian's ensurepip


def write_base(root: Path) -> None:
    """Write the image's files into the new folder `root`."""
    for folder in FOLDERS:
        (root / folder).mkdir(parents=True)
    for link in ("bin", "lib", "lib64", "sbin"):
        (root / link).symlink_to("usr/bin" if link in ("bin", "sbin") else "usr/lib")
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    programs = [*_copy_python(root), *_copy_tools(root)]
    _copy_libraries(root, programs)


def _copy_python(root: Path) -> list[Path]:
    """This Python at the same prefix, or below /usr/local; the files of it that are linked with libraries."""
    source, name = Path(sys.base_prefix), "python{}.{}".format(*sys.version_info)
    prefix = root / ("usr" if source == Path("/usr") else "usr/local")
    library = prefix / "lib" / name
    shutil.copytree(source / "lib" / name, library, ignore=shutil.ignore_patterns(*LEFT_OUT), symlinks=True)
    if DEBIAN_WHEELS.is_dir():
        shutil.copytree(DEBIAN_WHEELS, root / DEBIAN_WHEELS.relative_to("/"))
    program = prefix / "bin" / name
    shutil.copy(os.path.realpath(source / "bin" / name), program)
    program.with_name("python3").symlink_to(name)
    return [source / "bin" / name, *(source / "lib" / name / "lib-dynload").glob("*.so")]


def _copy_tools(root: Path) -> list[Path]:
    found = []
    for tool in TOOLS:
        path = shutil.which(tool)
        assert path is not None, f"there is no {tool} on this machine"
        shutil.copy(os.path.realpath(path), root / "usr/bin" / tool)
        found.append(Path(path))
    return found


def _copy_libraries(root: Path, programs: Iterable[Path]) -> None:
    """Copy what the programs are linked with into /usr/lib, where the loader looks without being told."""
    listed = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False).stdout
    needed = set(re.findall(r"(/\S+\.so\S*) \(0x", listed))
    cached = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True, check=True).stdout
    for name in LIBRARIES:
        (first, *_) = re.findall(rf"^\t{re.escape(name)} \(libc6,x86-64.*=> (\S+)$", cached, re.MULTILINE)
        needed.add(first)
    for path in needed:
        shutil.copy(os.path.realpath(path), root / "usr/lib" / Path(path).name)
