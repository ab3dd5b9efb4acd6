"""`python -m runtime.doctor ARTIFACT`: whether this machine can run this artifact, and if not, what to do about it.

It checks everything and does not stop at the first problem. To report which packages are missing it needs only Python's
standard library.
"""

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.artifact.build_number import add_minimum_build, required_build
from runtime.columns import in_columns
from runtime.engines.finding import AS_IT_SAYS, Finding, answer
from runtime.errors import USER_ERROR_STATUS, UserError, run_command

if TYPE_CHECKING:
    from runtime.artifact.manifest import Manifest

PYTHONS = ("3.11", "3.12", "3.13")  # the versions that `make ship` includes packages for
GLIBC = (2, 28)  # the oldest that those packages run on
PACKAGES = ("numpy", "msgspec", "apache-tvm-ffi")
SERVER_PACKAGES = ("starlette", "uvicorn", "prometheus-client")
GRAMMAR_PACKAGE = "llguidance"  # may be left out of a shipped file
TOKENIZER_PACKAGES = {"tokenizer.json": ("tokenizers", "jinja2"), "sentencepiece": ("sentencepiece", "jinja2")}
SPARE_DISK = 100e6  # bytes, for logs and bytecode caches
INSTALL = "run ./install.sh again, or `pip install --no-index --no-deps --find-links wheels -r requirements.txt`"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the findings; status 0 if nothing is wrong, else 2."""
    parser = argparse.ArgumentParser(
        prog="python -m runtime.doctor", description="Check whether this machine can run an artifact."
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT", help="folder that `make compile` wrote")
    add_minimum_build(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    findings = list(examine(args.artifact, args.minimum_build))
    print(json.dumps([asdict(finding) for finding in findings]) if args.json else table(findings))
    return USER_ERROR_STATUS if any(finding.remedy for finding in findings) else 0


def examine(folder: Path, minimum_build: int = 0) -> Iterator[Finding]:
    """Every finding; those that need the manifest are left out if it cannot be read."""
    yield _python()
    yield _glibc()
    yield from (_package(name) for name in PACKAGES)
    try:
        from runtime.artifact.folder import Artifact
        from runtime.artifact.signing import key_of_environment
    except ImportError as error:
        yield Finding("artifact", "not checked", "packages that can be imported", f"{error}; {INSTALL}")
        return
    try:
        key, minimum = key_of_environment(), required_build(minimum_build)
        manifest = Artifact.open(folder, for_this_machine=False, public_key=key, minimum_build=minimum).manifest
    except UserError as error:
        yield Finding("artifact", str(error), "unchanged files", AS_IT_SAYS)
        return
    signed = "" if key is None else f", signed by {key}"
    yield Finding("artifact", f"{manifest.name}, {len(manifest.files) + 1} files sound{signed}", "unchanged files")
    yield _ffi(manifest)
    if manifest.tokenizer is not None:
        yield from (_package(name) for name in (*TOKENIZER_PACKAGES[manifest.tokenizer.kind], *SERVER_PACKAGES))
    yield _library()
    yield _cpu(manifest)
    yield _disk(folder)
    from runtime.engines.machines import MACHINES

    yield from MACHINES[manifest.target.kind].examine(manifest)


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

    return answer("TVM's runtime", "loads", ask, INSTALL)


def _cpu(manifest: "Manifest") -> Finding:
    from runtime.artifact.cpu import check_cpu
    from runtime.engines.cpu_level import chosen_level

    levels = manifest.target.levels

    def ask() -> str:
        check_cpu(manifest.target.cpu_features, manifest.target.cpu)
        return f"{chosen_level(levels).cpu} will run"

    return answer("CPU", " or ".join(level.cpu for level in levels), ask, AS_IT_SAYS)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free
    remedy = "" if free >= SPARE_DISK else "free some space"
    return Finding("disk", f"{free / 1e9:,.1f} GB free", f"{SPARE_DISK / 1e9:,.1f} GB", remedy)


def table(findings: Sequence[Finding]) -> str:
    """The findings in aligned columns, followed by what to do."""
    cells = [
        ("", "check", "found", "expected"),
        *(("NO" if f.remedy else "ok", f.check, _short(f.found), f.expected) for f in findings),
    ]
    lines = in_columns(cells)
    wrong = [f"{f.check}: {f.found}. What to do: {f.remedy}." for f in findings if f.remedy]
    return "\n".join([*lines, *(["", *wrong] if wrong else ["", "This machine can run it."])])


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."


if __name__ == "__main__":
    run_command(main)
