"""`python -m runtime.doctor ARTIFACT`: can this machine run this artifact, and if not, what to do about it.

Looks at everything and never stops at the first finding; needs no package but those of Python itself to say which packages are missing.
"""

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.aligned import aligned
from runtime.errors import USER_ERROR_STATUS, UserError, run_command

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest

PYTHONS = ("3.11", "3.12", "3.13")  # what `make ship` carries packages for
GLIBC = (2, 28)  # what those packages are built for
PACKAGES = ("numpy", "msgspec", "apache-tvm-ffi")
TOKENIZER_PACKAGES = {"tokenizer.json": ("tokenizers", "jinja2"), "sentencepiece": ("sentencepiece", "jinja2")}
SPARE_DISK = 100e6  # bytes: logs, caches of bytecode
AS_IT_SAYS = "do as it says"
INSTALL = "run ./install.sh again, or `pip install --no-index --no-deps --find-links wheels -r requirements.txt`"


@dataclass(frozen=True)
class Finding:
    """One row of the table; `remedy` is empty where all is well."""

    check: str
    found: str
    expected: str
    remedy: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; status 0 if nothing is wrong, else 2."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.doctor", description="Check whether this machine can run an artifact."
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    findings = list(examine(args.artifact))
    print(json.dumps([asdict(finding) for finding in findings]) if args.json else table(findings))
    return USER_ERROR_STATUS if any(finding.remedy for finding in findings) else 0


def examine(folder: Path) -> Iterator[Finding]:
    """Everything that can be found out; what needs the manifest is left out where it cannot be read."""
    yield _python()
    yield _glibc()
    yield from (_package(name) for name in PACKAGES)
    try:
        from runtime.artifact.folder import Artifact
        from runtime.artifact.signing import key_of_environment
    except ImportError as error:
        yield Finding("artifact", "not looked at", "packages that can be imported", f"{error}; {INSTALL}")
        return
    try:
        key = key_of_environment()
        manifest = Artifact.open(folder, for_this_machine=False, public_key=key).manifest
    except UserError as error:
        yield Finding("artifact", str(error), "files as they were made", AS_IT_SAYS)
        return
    signed = "" if key is None else f", signed by {key}"
    yield Finding(
        "artifact", f"{manifest.name}, {len(manifest.files) + 1} files sound{signed}", "files as they were made"
    )
    yield _ffi(manifest)
    if manifest.tokenizer is not None:
        yield from (_package(name) for name in TOKENIZER_PACKAGES[manifest.tokenizer.kind])
    yield _library()
    yield _cpu(manifest)
    yield _disk(folder)
    yield from _cuda_findings(manifest) if manifest.target.kind == "cuda" else [_memory(manifest)]


def _python() -> Finding:
    found = "{}.{}".format(*sys.version_info)
    ok = found in PYTHONS and platform.machine() == "x86_64"
    remedy = "" if ok else f"run it with Python {PYTHONS[0]} to {PYTHONS[-1]} on an x86-64 machine"
    return Finding("python", f"{found} on {platform.machine()}", f"{PYTHONS[0]} to {PYTHONS[-1]} on x86_64", remedy)


def _glibc() -> Finding:
    name, text = platform.libc_ver()
    numbers = tuple(int(part) for part in text.split(".")[:2]) if name == "glibc" else (0, 0)
    remedy = "" if numbers >= GLIBC else "use a newer Linux (Debian 10, Ubuntu 20.04, RHEL 8 or later)"
    return Finding("C library", f"{name} {text}", "glibc {}.{} or newer".format(*GLIBC), remedy)


def _package(name: str) -> Finding:
    try:
        return Finding(name, version(name), "installed")
    except PackageNotFoundError:
        return Finding(name, "missing", "installed", INSTALL)


def _ffi(manifest: "Manifest") -> Finding:
    found = _package("apache-tvm-ffi").found
    wanted = manifest.tools.get("apache-tvm-ffi", "named by the artifact")
    return Finding("apache-tvm-ffi version", found, wanted, "" if found == wanted else INSTALL)


def _library() -> Finding:
    from runtime.engines.tvm_runtime import load_runtime

    def ask() -> str:
        load_runtime(1)
        return "loads"

    return _answer("TVM's runtime", "loads", ask, INSTALL)


def _cpu(manifest: "Manifest") -> Finding:
    from runtime.engines.cpu import check_cpu

    level = manifest.target.cpu

    def ask() -> str:
        check_cpu(manifest.target.cpu_features, level)
        return level

    return _answer("CPU", level, ask, "compile for the level that the message names")


def _answer(check: str, expected: str, ask: Callable[[], str], remedy: str) -> Finding:
    """What `ask` finds, or the sentence that it raises."""
    try:
        return Finding(check, ask(), expected)
    except (UserError, OSError, ImportError) as error:
        return Finding(check, str(error), expected, remedy)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    remedy = "" if free >= SPARE_DISK else "free some space"
    return Finding("disk", f"{free / 1e9:,.1f} GB free", f"{SPARE_DISK / 1e9:,.1f} GB", remedy)


def _memory(manifest: "Manifest") -> Finding:
    """Weights are mapped files, which the kernel may drop and read again: too little memory is slow, and caches would be killed."""
    from runtime.engines.loaded import SMALLER, device_bytes

    available = next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith("MemAvailable:")
    )
    needed = device_bytes(manifest)
    remedy = "" if available >= needed else f"free memory, or {SMALLER}"
    return Finding(
        "memory", f"{available / 1e9:,.1f} GB available", f"{needed / 1e9:,.1f} GB: weights, caches, workspace", remedy
    )


def _cuda_findings(manifest: "Manifest") -> Iterator[Finding]:
    from runtime.engines.cuda_driver import OLDEST_DRIVER, check_driver, read_driver, version_text
    from runtime.engines.loaded import SMALLER, device_bytes
    from runtime.engines.tvm_runtime import CUDA_LIBRARIES

    try:
        driver = read_driver()
        device = check_driver(driver, manifest.target.arch)
    except UserError as error:
        yield Finding("CUDA", str(error), f"a driver and a GPU of {', '.join(manifest.target.arch)}", AS_IT_SAYS)
        return
    for name in CUDA_LIBRARIES:
        yield _answer(name, "found", partial(_place, name), "copy the shipped runtime folder again")
    yield Finding("CUDA driver", f"CUDA {version_text(driver.version)}", f"CUDA {version_text(OLDEST_DRIVER)} or newer")
    yield Finding("GPU", "{}, sm_{}{}".format(device.name, *device.capability), ", ".join(manifest.target.arch))
    needed = device_bytes(manifest)
    remedy = "" if device.memory >= needed else f"use a larger GPU, or {SMALLER}"
    yield Finding(
        "GPU memory", f"{device.memory / 1e9:,.1f} GB", f"{needed / 1e9:,.1f} GB: weights, caches, workspace", remedy
    )


def _place(library: str) -> str:
    from runtime.engines.tvm_runtime import find_library

    return str(find_library(library))


def table(findings: Sequence[Finding]) -> str:
    """The findings in aligned columns, and below them what to do."""
    cells = [
        ("", "check", "found", "expected"),
        *(("NO" if f.remedy else "ok", f.check, _short(f.found), f.expected) for f in findings),
    ]
    lines = aligned(cells)
    wrong = [f"{f.check}: {f.found}. What to do: {f.remedy}." for f in findings if f.remedy]
    return "\n".join([*lines, *(["", *wrong] if wrong else ["", "This machine can run it."])])


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


if __name__ == "__main__":
    run_command(main)
