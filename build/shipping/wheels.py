"""The packages that a box installs without a network.

They are wheels of exactly the versions that this host runs, for each Python that a box may have.
"""

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

from export.workspace import made_whole
from runtime.artifact.manifest import Manifest
from runtime.doctor import PACKAGES, TOKENIZER_PACKAGES
from runtime.errors import UserError

# What the box's packages themselves import. pip's own resolution would add a hub client, an HTTP stack and a C parser,
# none of which is ever called.
IMPORTED_BY = {"apache-tvm-ffi": ("typing_extensions",), "jinja2": ("MarkupSafe",), "pynacl": ("cffi",)}
SIGNING = "pynacl"
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17)), "manylinux2014_x86_64")


def box_packages(manifest: Manifest) -> list[str]:
    """Names of all packages that the artifact needs on the box."""
    tokenizer = TOKENIZER_PACKAGES[manifest.tokenizer.kind] if manifest.tokenizer else ()
    direct = [*PACKAGES, *tokenizer, SIGNING]
    return [name for package in direct for name in (package, *IMPORTED_BY.get(package, ()))]


def fetch_wheels(packages: Sequence[str], pythons: Sequence[str], folder: Path) -> list[Path]:
    """Wheels of every package for every Python, from the package registry.

    Takes them from `folder` if an earlier call has put them there. Raises `UserError` if pip cannot get one.
    """
    requirements = [f"{package}=={version(package)}" for package in packages]
    by_name: dict[str, Path] = {}
    for python in pythons:
        place = folder / hashlib.sha256(f"{python} {requirements}".encode()).hexdigest()[:20]
        made_whole(place, partial(_download, requirements, python))
        by_name.update({path.name: path for path in place.glob("*.whl")})  # a wheel for several Pythons is kept once
    return [by_name[name] for name in sorted(by_name)]


def _download(requirements: Sequence[str], python: str, folder: Path) -> None:
    platforms = [part for name in PLATFORMS for part in ("--platform", name)]
    options = [
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary=:all:",
        "--python-version",
        python,
        *platforms,
    ]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), *requirements]
    result = subprocess.run(command, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode != 0:
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
