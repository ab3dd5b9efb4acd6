"""`python -m build.shipping.ship yaml/x.yaml`: write one file for the inference box, out/NAME.tar.zst.

    NAME/install.sh         makes .venv from wheels/, without a network, and runs the doctor
    NAME/requirements.txt   the packages in wheels/, at exact versions, with their hashes
    NAME/wheels/            packages for each Python of `--pythons`
    NAME/artifact/          the artifact, with golden prompts and, if a key was given, a signature
    NAME/runtime/           this project's runtime package, with TVM's runtime libraries in lib/
    NAME/sbom.cdx.json      what all of this is, with versions, licences and sums, for tools that read CycloneDX
    NAME/SHA256SUMS         the sum of every other file and, if a key was given, SHA256SUMS.sig, its signature;
                            install.sh checks both before it runs anything

The same inputs give the same bytes: names are sorted, times and owners are zero, and the compressor's version is
pinned.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import distribution
from pathlib import Path

import msgspec
from rich.table import Table

import runtime
from build.compile import compile_held
from build.shipping.archive import Member, with_sums, write_archive
from build.shipping.golden import with_golden
from build.shipping.keys import sign
from build.shipping.sbom import SBOM_FILE, bill_of_materials
from build.shipping.wheels import all_packages, fetch_wheels, installed_bytes, requirements_text
from export.configuration.config import config_parser
from export.console import console, output
from export.job import Job
from export.workspace import locked
from runtime.artifact.build_number import build_number
from runtime.artifact.folder import Artifact, replace_manifest
from runtime.artifact.manifest import Manifest
from runtime.artifact.signing import PRIVATE_KEY, read_line
from runtime.artifact.targets import TARGETS, TargetKind
from runtime.doctor import PYTHONS
from runtime.engines.tvm_runtime import RUNTIME_LIBRARY, find_library
from runtime.errors import UserError, run_command

GPU_CHECK = ("gpu_check", "gpucheck")  # package and command of the runtime that only `build.gpucheck` ships
SERVER = ("server", "serve")  # those that it does not
SUFFIXES = (".py", ".html")  # of the runtime's files
INSTALLER = Path(__file__).with_name("install.sh")


def main() -> int:
    """Write the file; returns the exit status."""
    arguments = parser().parse_args()
    job = Job.load(arguments.config, arguments.overrides)
    pythons = pythons_of(arguments)
    if arguments.key is not None:
        read_line(arguments.key, PRIVATE_KEY)  # a wrong key is refused before anything takes time
    name = job.artifact.name
    target = job.artifact.with_name(f"{name}.tar.zst")
    with locked(job.workspace, console.print):  # to the end, so that no other run replaces what goes into the archive
        artifact = numbered(with_golden(compile_held(job), job), arguments.build)
        if arguments.key is not None:
            sign(artifact.folder, arguments.key)
        wheels = fetch_wheels(
            all_packages(artifact.manifest, grammars=not arguments.no_grammars),
            pythons,
            job.config.workspace.path / "wheels",
        )
        members = with_sums(members_of(artifact, wheels, pythons), arguments.key)
        write_archive(members, name, target)
    output.print(summary(members, target, wheels, pythons))
    check = "" if arguments.key is None else " --public-key FILE"
    output.print(f"on the box:  tar --zstd -xf {target.name} && cd {name} && ./install.sh{check}")
    output.print('             .venv/bin/python -m runtime.generate artifact --prompt "..."')
    return 0


def numbered(artifact: Artifact, number: int) -> Artifact:
    """The artifact with this build number, not signed: a signature belongs to the build before."""
    manifest = msgspec.structs.replace(artifact.manifest, build_number=number)
    replace_manifest(artifact.folder, manifest)
    return Artifact(artifact.folder, manifest)


def parser() -> argparse.ArgumentParser:
    """The command's argument parser."""
    result = config_parser("Put an artifact, its runtime and their packages into one file.")
    add_box_options(result)
    result.add_argument(
        "--no-grammars",
        action="store_true",
        help="leave out the package that makes answers fit a JSON schema, which takes 8 MB of a box",
    )
    result.add_argument(
        "--key",
        type=Path,
        metavar="FILE",
        help="private key that signs the artifact and the whole file, as `make keys` writes it",
    )
    result.add_argument(
        "--build",
        type=lambda text: build_number(text, "--build"),
        default=0,
        metavar="N",
        help="build number; boxes that ask for a larger one refuse the artifact (default: %(default)s)",
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
    """Every file of the archive but that of the sums, by its path below NAME/, sorted."""
    sums = {entry.path: entry.sha256 for entry in artifact.manifest.files}
    members = system_members(artifact.manifest.target.kind, wheels, pythons) | {
        f"artifact/{path.name}": Member(
            path, "weights" if path.suffix == ".safetensors" else "artifact", known_sum=sums.get(path.name)
        )
        for path in artifact.folder.iterdir()
    }
    return with_bill(members, artifact.manifest.name, artifact.manifest)


def with_bill(members: dict[str, Member], name: str, manifest: Manifest | None) -> dict[str, Member]:
    """The members, sorted, with the bill of materials."""
    bill = Member(bill_of_materials(name, members, manifest), "runtime")
    return dict(sorted({**members, SBOM_FILE: bill}.items()))


def system_members(
    kind: TargetKind, wheels: Sequence[Path], pythons: Sequence[str], *, gpu_check: bool = False
) -> dict[str, Member]:
    """The files that a box needs to run an artifact for one kind of target.

    With the check of kernels if `gpu_check`, and otherwise with the server.
    """
    package = Path(runtime.__path__[0])
    left_out = SERVER if gpu_check else GPU_CHECK
    found = [path.relative_to(package) for suffix in SUFFIXES for path in package.rglob(f"*{suffix}")]
    modules = [path for path in found if not {path.parts[0], path.stem} & set(left_out)]
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


def summary(members: Mapping[str, Member], target: Path, wheels: Sequence[Path], pythons: Sequence[str]) -> Table:
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
