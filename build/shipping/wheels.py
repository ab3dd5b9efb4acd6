"""The packages that a box installs without a network.

They are wheels of exactly the versions that this host runs, for each Python that a box may have. Each has a SHA-256
that requirements.lock lists, whether it was just downloaded or lay in the cache.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from build.shipping.lock import LOCK, Pin, canonical, fits, lock_text, read_lock, version_in
from export.console import console
from export.workspace import locked
from runtime.artifact.hashing import file_entry
from runtime.artifact.manifest import Manifest
from runtime.doctor import GRAMMAR_PACKAGE, PACKAGES, SERVER_PACKAGES, TOKENIZER_PACKAGES
from runtime.errors import UserError

# What the box's packages themselves import. pip's own resolution would add a hub client, an HTTP stack and a C parser,
# none of which is ever called.
IMPORTED_BY = {
    "apache-tvm-ffi": ("typing_extensions",),
    "jinja2": ("MarkupSafe",),
    "pynacl": ("cffi",),
    "starlette": ("anyio",),
    "uvicorn": ("h11", "click"),
}
SIGNING = "pynacl"
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17)), "manylinux2014_x86_64")


def box_packages(manifest: Manifest) -> list[str]:
    """Names of all packages that the artifact needs on the box, without those of the server."""
    tokenizer = TOKENIZER_PACKAGES[manifest.tokenizer.kind] if manifest.tokenizer else ()
    return _with_imported([*PACKAGES, *tokenizer, SIGNING])


def all_packages(manifest: Manifest, *, grammars: bool) -> list[str]:
    """Names of all packages of a shipped file, with those of the server, which a model without a tokenizer lacks."""
    if manifest.tokenizer is None:
        return box_packages(manifest)
    server = _with_imported([*SERVER_PACKAGES, *([GRAMMAR_PACKAGE] if grammars else [])])
    return [*box_packages(manifest), *server]


def _with_imported(packages: Sequence[str]) -> list[str]:
    return [name for package in packages for name in (package, *IMPORTED_BY.get(package, ()))]


def fetch_wheels(packages: Sequence[str], pythons: Sequence[str], folder: Path, lock: Path = LOCK) -> list[Path]:
    """Wheels of every package for every Python, from the package registry.

    Takes those from `folder` that an earlier call has put there. Raises `UserError` for one whose sum is not in the
    lock file, and if pip cannot get one.
    """
    pins = read_lock(lock)
    wanted = [_wanted(package, pins, lock) for package in packages]
    by_name: dict[str, Path] = {}
    with locked(folder, console.print):  # all configs share the cache
        for python in pythons:
            wheels = _wheels_for(wanted, python, folder / python, lock)
            by_name.update({wheel.name: wheel for wheel in wheels})  # a wheel for several Pythons is kept once
    return [by_name[name] for name in sorted(by_name)]


def _wanted(package: str, pins: dict[str, Pin], lock: Path) -> Pin:
    """The pin of a package, which must be of the version that this host runs."""
    pin, installed = pins.get(canonical(package)), version(package)
    if pin is None or pin.version != installed:
        raise UserError(
            f"{lock} pins {package} {'not at all' if pin is None else pin.version}, but .venv has {installed}, and a "
            "box gets what this host has tried; run `make setup`, or correct the pin and run `make lock`"
        )
    return pin


def _wheels_for(pins: Sequence[Pin], python: str, place: Path, lock: Path) -> list[Path]:
    """The wheels for one Python, of which those that `place` lacks are downloaded."""
    place.mkdir(exist_ok=True)
    for left in place.glob("[0-9]*.download"):  # by a killed run
        shutil.rmtree(left)
    held = {pin.name: _held(pin, python, place, lock) for pin in pins}
    missing = [pin for pin in pins if held[pin.name] is None]
    if missing:
        fresh = place / f"{os.getpid()}.download"
        fresh.mkdir()
        try:
            _download(missing, python, fresh, lock)
            for wheel in fresh.glob("*.whl"):
                wheel.replace(place / wheel.name)
        finally:
            shutil.rmtree(fresh)
        held |= {pin.name: _held(pin, python, place, lock) for pin in missing}
    return [wheel for wheel in held.values() if wheel is not None]


def _held(pin: Pin, python: str, place: Path, lock: Path) -> Path | None:
    """The wheel of a package in the cache, if there is one; one with a sum that is not locked is removed."""
    for wheel in sorted(place.glob("*.whl")):
        if version_in(wheel.name, pin.name) != pin.version or not fits(wheel.name, python):
            continue
        found = file_entry(wheel).sha256
        if found not in pin.sums:
            wheel.unlink()
            raise UserError(
                f"{wheel} had the SHA-256 {found}, expected one that {lock} lists for {pin.name}=={pin.version}, so it "
                "was removed; run this again to download it anew"
            )
        return wheel
    return None


def _download(pins: Sequence[Pin], python: str, folder: Path, lock: Path) -> None:
    requirements = folder / "requirements.txt"
    requirements.write_text(lock_text("", pins))
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--require-hashes",
        "--only-binary=:all:",
        "--python-version",
        python,
        *platforms,
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), "-r", str(requirements)]
    result = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
        changed = re.search(r"DO NOT MATCH THE HASHES.*?(\S+==\S+)", result.stdout, re.DOTALL)
        if changed:
            raise UserError(
                f"the file that pip was given for {changed[1]} on Python {python} has no sum that {lock} lists and was "
                "not kept; find out why this registry serves another file before you run `make lock`"
            )
        raise UserError(
            f"pip cannot get the box's packages for Python {python}: "
            f"{(result.stdout.strip().splitlines() or ['it said nothing'])[-1]}; "
            "check this host's network, or name other versions with PYTHONS=..."
        )


def requirements_text(wheels: Sequence[Path]) -> str:
    """The box's requirements: exact versions, each with the hashes of its wheels, which pip checks."""
    sums: dict[str, list[str]] = {}
    for wheel in wheels:
        name, number = wheel.name.split("-")[:2]
        sums.setdefault(f"{name.replace('_', '-')}=={number}", []).append(
            hashlib.sha256(wheel.read_bytes()).hexdigest()
        )
    return "".join(
        f"{pin}{''.join(f' --hash=sha256:{digest}' for digest in sorted(digests))}\n"
        for pin, digests in sorted(sums.items())
    )


def installed_bytes(wheels: Sequence[Path], python: str) -> int:
    """Disk space that the wheels for one Python take once they are installed."""
    tag = f"cp{python.replace('.', '')}"
    total = 0
    for wheel in wheels:
        if f"-{tag}-" in wheel.name or "-abi3-" in wheel.name or "-none-any" in wheel.name:
            with zipfile.ZipFile(wheel) as archive:
                total += sum(member.file_size for member in archive.infolist())
    return total
