"""A folder whose kernels can be checked: an artifact, or one of `checks/` as `make gpucheck` ships it."""

from pathlib import Path

from runtime.artifact.build_number import check_build_number, required_build
from runtime.artifact.consistency import LIBRARY_FILE, MANIFEST_FILE
from runtime.artifact.folder import read_manifest
from runtime.artifact.hashing import check_sums
from runtime.artifact.manifest import Manifest
from runtime.artifact.signing import key_of_environment
from runtime.artifact.targets import TARGETS
from runtime.errors import UserError


def checked_manifest(folder: Path) -> Manifest:
    """The manifest of an artifact or of a check folder, signed and as new as this environment requires.

    Raises `UserError` if there is no manifest, or none that lists the library with its sum and names CUDA kernels.
    """
    path = folder / MANIFEST_FILE
    manifest = read_manifest(folder, key_of_environment())
    check_build_number(folder, manifest.build_number, required_build())
    library = [entry for entry in manifest.files if entry.path == LIBRARY_FILE]
    if len(library) != 1:
        raise UserError(
            f"{path} lists no {LIBRARY_FILE}; name an artifact, or a folder of checks/ as `make gpucheck` ships it"
        )
    check_sums(folder, library)
    if not TARGETS[manifest.target.kind].on_device:
        raise UserError(
            f"{path} is for the target {manifest.target.kind}, expected cuda: compile it with backend.target: cuda"
        )
    if not manifest.calls:
        raise UserError(f"{path} names no kernel, expected those that the library calls; compile it again")
    return manifest
