"""`python -m build.shipping.ship yaml/x.yaml`: write one file for the inference box, out/NAME.tar.zst.

    NAME/install.sh         makes .venv from wheels/, without a network, and runs the doctor
    NAME/requirements.txt   the packages in wheels/, at exact versions, with their hashes
    NAME/wheels/            packages for each Python of `--pythons`
    NAME/artifact/          the artifact, with golden prompts and, if a key was given, a signature
    NAME/runtime/           this project's runtime package, with TVM's runtime libraries in lib/

The same inputs give the same bytes: names are sorted, times and owners are zero, and the compressor's version is
pinned.
"""

import argparse
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from io import BytesIO
from pathlib import Path

import zstandard
from rich.table import Table

import runtime
from build.compile import compile_job
from build.shipping.golden import with_golden
from build.shipping.keys import sign
from build.shipping.wheels import box_packages, fetch_wheels, installed_bytes, requirements_text
from export.configuration.config import config_parser
from export.console import byte_bar, output
from export.job import Job
from runtime.artifact.folder import Artifact
from runtime.artifact.signing import PRIVATE_KEY, SIGNATURE_FILE, read_line
from runtime.artifact.targets import TARGETS, TargetKind
from runtime.doctor import PYTHONS
from runtime.engines.tvm_runtime import RUNTIME_LIBRARY, find_library
from runtime.errors import UserError, run_command

LEVEL = 6  # of compression: weights hardly shrink, and a higher level takes longer than the copy saves
GPU_CHECK = ("gpu_check", "gpucheck")  # package and command of the runtime that only `build.gpucheck` ships
INSTALLER = Path(__file__).with_name("install.sh")


@dataclass(frozen=True)
class Member:
    """One file of the archive: its source, a file or bytes, and the row of the summary that it counts in."""

    source: Path | bytes
    part: str
    executable: bool = False

    @property
    def size(self) -> int:
        """Size in bytes."""
        return len(self.source) if isinstance(self.source, bytes) else self.source.stat().st_size


def main() -> int:
    """Write the file; returns the exit status."""
    arguments = parser().parse_args()
    job = Job.load(arguments.config, arguments.overrides)
    folder = job.artifact
    pythons = pythons_of(arguments)
    if arguments.key is not None:
        read_line(arguments.key, PRIVATE_KEY)  # a wrong key is refused before anything takes time
    artifact = with_golden(compile_job(job), job)
    (artifact.folder / SIGNATURE_FILE).unlink(missing_ok=True)
    if arguments.key is not None:
        sign(artifact.folder, arguments.key)
    wheels = fetch_wheels(box_packages(artifact.manifest), pythons, job.config.workspace.path / "wheels")
    target = folder.with_name(f"{folder.name}.tar.zst")
    members = members_of(artifact, wheels, pythons)
    write_archive(members, folder.name, target)
    output.print(summary(members, target, wheels, pythons))
    output.print(f"on the box:  tar --zstd -xf {target.name} && cd {folder.name} && ./install.sh")
    output.print('             .venv/bin/python -m runtime.generate artifact --prompt "..."')
    return 0


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    result = config_parser("Put an artifact, its runtime and their packages into one file.")
    add_box_options(result)
    result.add_argument(
        "--key", type=Path, metavar="FILE", help="private key that signs the artifact, as `make keys` writes it"
    )
    return result


def add_box_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe a box."""
    parser.add_argument(
        "--pythons",
        default=" ".join(PYTHONS),
        metavar="'3.11 ...'",
        help="Python versions of the boxes (default: %(default)s)",
    )


def pythons_of(arguments: argparse.Namespace) -> list[str]:
    """The Python versions from `add_box_options`; raises `UserError` for one that there are no packages for."""
    pythons: list[str] = arguments.pythons.split()
    if not pythons or not set(pythons) <= set(PYTHONS):
        raise UserError(f"--pythons is {arguments.pythons!r}, expected some of {' '.join(PYTHONS)}")
    return pythons


def members_of(artifact: Artifact, wheels: Sequence[Path], pythons: Sequence[str]) -> dict[str, Member]:
    """Every file of the archive by its path below NAME/, sorted."""
    parts = {path: "weights" if path.suffix == ".safetensors" else "artifact" for path in artifact.folder.iterdir()}
    members = system_members(artifact.manifest.target.kind, wheels, pythons)
    return dict(
        sorted((members | {f"artifact/{path.name}": Member(path, part) for path, part in parts.items()}).items())
    )


def system_members(
    kind: TargetKind, wheels: Sequence[Path], pythons: Sequence[str], *, gpu_check: bool = False
) -> dict[str, Member]:
    """The files that a box needs to run an artifact for one kind of target; with the kernel check if `gpu_check`."""
    package = Path(runtime.__path__[0])
    modules = [path.relative_to(package) for path in package.rglob("*.py")]
    modules = [path for path in modules if gpu_check or not {path.parts[0], path.stem} & set(GPU_CHECK)]
    return {
        "install.sh": Member(
            INSTALLER.read_text().replace("@PYTHONS@", " ".join(pythons)).encode(), "runtime", executable=True
        ),
        "requirements.txt": Member(requirements_text(wheels).encode(), "runtime"),
        **{f"wheels/{wheel.name}": Member(wheel, "packages") for wheel in wheels},
        **{f"runtime/{path}": Member(package / path, "runtime") for path in modules},
        **{f"runtime/lib/{path.name}": Member(path, "TVM runtime") for path in runtime_libraries(kind)},
        **{f"runtime/lib/LICENSE.{name}": Member(path, "TVM runtime") for name, path in licenses(kind)},
    }


def runtime_libraries(kind: TargetKind) -> list[Path]:
    """The shared libraries that the box's runtime loads, except the driver."""
    return [find_library(name) for name in (RUNTIME_LIBRARY, *TARGETS[kind].libraries)]


def licenses(kind: TargetKind) -> Iterator[tuple[str, Path]]:
    """Yield the licence of each package whose libraries are shipped."""
    for package in ("apache-tvm", *TARGETS[kind].packages):
        for file in distribution(package).files or ():
            if file.name in ("LICENSE", "LICENSE.txt", "License.txt"):
                yield f"{package}{file.suffix}", Path(str(file.locate()))


def write_archive(members: dict[str, Member], name: str, target: Path) -> None:
    """Write `target`, complete or not at all."""
    fresh = target.with_name(f".{target.name}.tmp")
    try:
        compressor = zstandard.ZstdCompressor(level=LEVEL, threads=-1)
        with (
            fresh.open("wb") as file,
            compressor.stream_writer(file) as stream,
            tarfile.open(fileobj=stream, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            byte_bar("shipping", sum(member.size for member in members.values())) as bar,
        ):
            for path, member in members.items():
                info = tarfile.TarInfo(f"{name}/{path}")
                info.size = member.size
                info.mode = 0o755 if member.executable else 0o644
                with BytesIO(member.source) if isinstance(member.source, bytes) else member.source.open("rb") as source:
                    tar.addfile(info, source)
                bar.advance(member.size)
        fresh.replace(target)
    finally:
        fresh.unlink(missing_ok=True)


def summary(members: dict[str, Member], target: Path, wheels: Sequence[Path], pythons: Sequence[str]) -> Table:
    """Tabulate the contents of the file, in MB."""
    table = Table(title=f"{target}: {target.stat().st_size / 1e6:,.1f} MB", title_justify="left")
    table.add_column("part")
    table.add_column("MB", justify="right")
    sizes: Counter[str] = Counter()
    for member in members.values():
        sizes[member.part] += member.size
    for part, size in sizes.most_common():
        table.add_row(part, f"{size / 1e6:,.1f}")
    table.add_row(f"packages, installed for Python {pythons[0]}", f"{installed_bytes(wheels, pythons[0]) / 1e6:,.1f}")
    return table


if __name__ == "__main__":
    run_command(main)
