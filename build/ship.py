"""`python -m build.ship yaml/x.yaml`: one file for the inference box, out/NAME.tar.

    NAME/artifact/          the artifact as it is
    NAME/runtime/           this project's runtime package, with TVM's runtime library in lib/
    NAME/requirements.txt   what the box installs with pip, at exact versions

The same inputs give the same bytes: names are sorted, times and owners are zero.
"""

import argparse
import tarfile
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

import runtime
from export.config import artifact_dir
from export.console import byte_bar, console
from runtime.artifact import Artifact
from runtime.errors import UserError, run_command
from runtime.tvm_runtime import RUNTIME_LIBRARY, find_runtime_library

BOX_PACKAGES = ("numpy", "apache-tvm-ffi", "msgspec")
TOKENIZER_PACKAGES = {"tokenizer.json": ("tokenizers", "jinja2"), "sentencepiece": ("sentencepiece", "jinja2")}


def main() -> int:
    """Write the file; returns the exit status."""
    parser = argparse.ArgumentParser(description="Put an artifact and its runtime into one file.")
    parser.add_argument("config", type=Path, help="the YAML file that was compiled")
    folder = artifact_dir(parser.parse_args().config)
    artifact = Artifact.open(folder, for_this_machine=False)
    target = folder.with_suffix(".tar")
    ship(artifact, target)
    console.print(f"{target}: {target.stat().st_size / 1e6:,.1f} MB; on the box:")
    console.print(f"  tar xf {target.name} && cd {folder.name} && pip install -r requirements.txt")
    console.print('  python -m runtime.generate artifact --prompt "..."')
    return 0


def ship(artifact: Artifact, target: Path) -> None:
    """Write `target`, complete or not at all; UserError for an artifact whose target the shipped runtime cannot start."""
    if artifact.manifest.target.kind != "llvm":
        raise UserError(
            f"{artifact.folder} is compiled for {artifact.manifest.target.kind}; only llvm artifacts can be shipped with a runtime so far"
        )
    name = target.stem
    members = sorted({**_artifact_files(artifact, name), **_runtime_files(name)}.items())
    fresh = target.with_suffix(".tar.tmp")
    try:
        with tarfile.open(fresh, "w", format=tarfile.USTAR_FORMAT) as tar, byte_bar("shipping", sum(p.stat().st_size for _, p in members)) as bar:
            _add_bytes(tar, f"{name}/requirements.txt", requirements(artifact).encode())
            for path_in_tar, path in members:
                _add_file(tar, path_in_tar, path)
                bar.advance(path.stat().st_size)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def requirements(artifact: Artifact) -> str:
    """What the box needs beside the file, one exact version a line."""
    tokenizer = artifact.manifest.tokenizer
    packages = BOX_PACKAGES + (TOKENIZER_PACKAGES[tokenizer.kind] if tokenizer else ())
    return "".join(f"{package}=={version(package)}\n" for package in packages)


def _artifact_files(artifact: Artifact, name: str) -> dict[str, Path]:
    return {f"{name}/artifact/{path.name}": path for path in artifact.folder.iterdir()}


def _runtime_files(name: str) -> dict[str, Path]:
    folder = Path(runtime.__path__[0])
    files = {f"{name}/runtime/{path.name}": path for path in folder.glob("*.py")}
    return {**files, f"{name}/runtime/lib/{RUNTIME_LIBRARY}": find_runtime_library()}


def _add_file(tar: tarfile.TarFile, name: str, path: Path) -> None:
    info = tarfile.TarInfo(name)
    info.size = path.stat().st_size
    with path.open("rb") as file:
        tar.addfile(info, file)


def _add_bytes(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, BytesIO(data))


if __name__ == "__main__":
    run_command(main)
