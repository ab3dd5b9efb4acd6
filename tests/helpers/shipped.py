"""A box for shipped files: a folder, an environment that names no network address, and the installed size."""

import subprocess
import sys
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import zstandard

PYTHON = "{}.{}".format(*sys.version_info)
# bytes installed besides weights, Python, numpy and the tokenizer libraries; for the server; and for grammars
OWN_LIMIT, SERVER_LIMIT, GRAMMARS_LIMIT = 30e6, 4e6, 8e6
SERVER = ("starlette", "uvicorn", "prometheus_client", "anyio", "h11", "click")
GRAMMARS = ("llguidance",)
TOKENIZERS = ("tokenizers", "sentencepiece", "jinja2", "markupsafe")
OTHERS = ("numpy", *TOKENIZERS, "pip", "setuptools", "pkg_resources", "_distutils_hack", "distutils-precedence")


def box_environment() -> dict[str, str]:
    """The environment of a box: no project, no caches, and no reachable package index."""
    return {
        "PATH": "/usr/bin:/bin",
        "PIP_INDEX_URL": "http://127.0.0.1:9/",
        "PIP_CONFIG_FILE": "/dev/null",
        "HOME": "/nonexistent",
    }


def on_the_box(box: Path, *arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run a module of an installed box, as a person would."""
    return subprocess.run(
        [box / ".venv/bin/python", "-m", *arguments],
        cwd=box,
        env=box_environment() | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the archive into `folder`; return the one folder that it holds."""
    with (
        archive.open("rb") as file,
        zstandard.ZstdDecompressor().stream_reader(file) as stream,
        tarfile.open(fileobj=stream, mode="r|") as tar,
    ):
        tar.extractall(folder, filter="data")  # as `tar --zstd -xf` does; a test machine may lack zstd
    (box,) = folder.iterdir()
    return box


def install(box: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the installer with this Python."""
    return subprocess.run(
        [box / "install.sh", *options, sys.executable],
        env=box_environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def executable(path: Path, body: str) -> Path:
    """A command of a box that is a shell script."""
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def own_bytes(box: Path) -> int:
    """Bytes of our package, TVM's libraries and what is installed for them, without the server and grammars."""
    others = (*OTHERS, *SERVER, *GRAMMARS)
    packages = [path for path in _packages(box) if not path.name.startswith(others)]
    return _bytes([box / "runtime", *packages]) - _bytes([box / "runtime" / "server"])


def server_bytes(box: Path) -> int:
    """Bytes of the server: our part, and its packages."""
    return _bytes([box / "runtime" / "server", *_named(box, SERVER)])


def grammar_bytes(box: Path) -> int:
    """Bytes of the package for grammars."""
    return _bytes(_named(box, GRAMMARS))


def _named(box: Path, names: Sequence[str]) -> list[Path]:
    found = [path for path in _packages(box) if path.name.startswith(tuple(names))]
    assert len(found) >= len(names)
    return found


def _packages(box: Path) -> list[Path]:
    (packages,) = box.glob(".venv/lib/*/site-packages")
    return list(packages.iterdir())


def _bytes(paths: Iterable[Path]) -> int:
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    return sum(file.stat().st_size for file in files)
