"""The artifact on disk: what the folder contains, how it is opened, and how it is written.

An artifact is a folder. Its name and place mean nothing; it MAY be moved, copied and renamed. It holds these files and
nothing else:

    manifest.json         `runtime.artifact.manifest.Manifest` as JSON
    library.so            the compiled functions; for CUDA, with machine code for `target.arch` inside
    library.CPU.so        the same functions for a better CPU level, for each of `target.better_levels`
    weights.safetensors   every weight, in the order in which each compiled function takes them
    `tokenizer.file`, `tokenizer.chat_template`   as named by the manifest, if it has a tokenizer
    `golden`              prompts with the outputs that they must give (`runtime.artifact.golden`), if the manifest
                          names such a file
    manifest.sig          a signature of manifest.json (`runtime.artifact.signing`), if it was signed

Rules, each checked by `Artifact.open` before the library is loaded, cheapest first:

 1. The folder MUST exist. Everything in it MUST be a regular file: no folder, no link, no device.
 2. `manifest.json` MUST have at most 16 MiB and be JSON. Its `schema_version` MUST be this runtime's; only then is the
    rest decoded, and every key and type MUST be known.
 3. `files` MUST list every file but `manifest.json` and `manifest.sig`, each once, by a plain name: ASCII letters,
    digits, `.`, `_`, `-`, beginning with a letter or digit. So there is no path to another folder, no hidden file, and
    no name that two systems read differently.
 4. `library.so`, the library of each better level and `weights.safetensors` MUST be listed; a file that no part of the
    manifest uses MUST NOT be.
 5. A file MUST NOT be empty. A library has at most 1 GiB, and any other file except the weights at most 256 MiB.
 6. `sha256` is the plain SHA-256 of the file, so `sha256sum` agrees. For a file above 16 MiB (2**24 bytes), `blocks`
    MUST list the SHA-256 of each 16 MiB block (the last one may be shorter); for a smaller file it MUST be empty.
 7. Model, shape, graphs, weights, tokenizer and target MUST agree: one graph `prefill_T` for each chunk T and, if the
    head is a causal language model, one graph `decode` (one token), each with the inputs and outputs that model and
    shape imply (`runtime.artifact.consistency` has the details).
 8. Every listed file MUST exist with its size, and no other file may exist.
 9. This machine's CPU MUST have every flag in `target.cpu_features`. The engine takes the best of the levels that the
    CPU has, and checks whether a CUDA device fits `target.arch`.
10. The header of `weights.safetensors` MUST describe exactly the tensors of `weights`: same names, order, dtypes and
    shapes, each tensor beginning at a multiple of 64 bytes.
11. Contents MUST match their sums. A file with `blocks` is checked by those alone, on all cores: they cover every byte.

`parity` and `golden` MAY be null. All of it is data: no file but the library is code, and none is a pickle. The sums
detect damage. Whoever can write to the folder can run code through its library, unless `open` is given a public key:
then the signature of the manifest is checked before anything is used, and through the manifest's sums it covers every
other byte. The library that is used is hashed once more in memory that is sealed against changes, and loaded from
there, so no code runs but what was signed.

Weights on the CPU are mapped, not copied. Each `open` hashes all of them in parallel, at the speed of the disk or of
the cores, and the same reads fill the page cache that the mapping then uses. Nothing watches the file afterwards: a
change of its contents under a running process is not detected. Replacing the artifact through `write_artifact` is safe,
since the old files live on until they are unmapped. An `open` that meets a replacement half-way finds sums that do not
match, and says so.
"""

import os
import shutil
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import msgspec
from numpy.typing import NDArray

from runtime.artifact import manifest as contract
from runtime.artifact.build_number import check_build_number
from runtime.artifact.consistency import LIBRARY_FILE, MANIFEST_FILE, WEIGHTS_FILE, check_manifest, library_file
from runtime.artifact.cpu import check_cpu
from runtime.artifact.durable import replaced_whole, sync
from runtime.artifact.hashing import check_sums, file_entry
from runtime.artifact.manifest import SCHEMA_VERSION, CpuLevel, FileEntry, Manifest
from runtime.artifact.replacing import refuse_other_folder, remove_stale, sibling, swap_in
from runtime.artifact.sealed import sealed_copy
from runtime.artifact.signing import SIGNATURE_FILE, check_signature
from runtime.artifact.tensor_file import ALIGNMENT, TensorFile
from runtime.errors import UserError

MANIFEST_LIMIT = 16 * 2**20  # bytes


@dataclass(frozen=True)
class Artifact:
    """A folder that has passed every check in this module."""

    folder: Path
    manifest: Manifest

    @property
    def library(self) -> Path:
        """The compiled library of the lowest CPU level."""
        return self.folder / LIBRARY_FILE

    def sealed_library(self, level: CpuLevel) -> Path:
        """A copy of the library of a CPU level that has its sum and that nothing can change, to be loaded."""
        return sealed_library(self.folder, self.manifest, level)

    def weights(self) -> dict[str, NDArray[Any]]:
        """Every weight by name, as views of one mapping of the file (bfloat16 as uint16 bits)."""
        return self.weights_file().map()

    def weights_file(self) -> TensorFile:
        """The file of all weights."""
        return TensorFile.open(self.folder / WEIGHTS_FILE)

    @classmethod
    def open(
        cls, folder: Path, *, for_this_machine: bool = True, public_key: Path | None = None, minimum_build: int = 0
    ) -> Self:
        """Check every rule in this module's list and return the artifact; raises `UserError` at the first broken rule.

        `for_this_machine=False` skips rule 9, for artifacts compiled for another machine. With a `public_key`, its
        owner must have signed the manifest, which is checked before anything else is read. A build number below
        `minimum_build` is refused next.
        """
        try:
            manifest = read_manifest(folder, public_key)
            check_build_number(folder, manifest.build_number, minimum_build)
            check_manifest(manifest, str(folder / MANIFEST_FILE))
            _check_listing(folder, manifest)
            if for_this_machine:
                check_cpu(manifest.target.cpu_features, manifest.target.cpu)
            _check_weights(folder / WEIGHTS_FILE, manifest)
            check_sums(folder, manifest.files)
        except OSError as error:
            raise UserError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
        return cls(folder, manifest)


class _Version(msgspec.Struct):
    """The one key that every schema has."""

    schema_version: int


def read_manifest(folder: Path, public_key: Path | None = None) -> Manifest:
    """Read the manifest alone: checks rules 1 (for the folder and this file) and 2, and the signature if requested."""
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise UserError(
            f"there is no artifact folder {folder}; compile one with `make compile CONFIG=...` or check the path"
        )
    if not os.path.lexists(path):
        raise UserError(
            f"{folder} is not an artifact: it has no {MANIFEST_FILE}; "
            "compile one with `make compile CONFIG=...` or check the path"
        )
    info = path.lstat()
    if not stat.S_ISREG(info.st_mode):
        raise UserError(f"{path} is not a regular file; copy the artifact again, with files and not links")
    if info.st_size > MANIFEST_LIMIT:
        raise UserError(
            f"{path} has {info.st_size} bytes, expected at most {MANIFEST_LIMIT}; compile the artifact again"
        )
    data = path.read_bytes()
    if public_key is not None:
        check_signature(folder, data, public_key)
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(
            f"{path} is not a valid manifest: {error}; copy the artifact again or compile it again"
        ) from error
    if version != SCHEMA_VERSION:
        raise UserError(
            f"{path} has schema version {version}, but this runtime reads {SCHEMA_VERSION}; "
            "use its own runtime or compile it again"
        )
    return contract.from_json(data, Manifest, str(path))


def _check_listing(folder: Path, manifest: Manifest) -> None:
    """Check rules 1 and 8: the files in the folder are those that are listed, by name and size."""
    sizes = {}
    for entry in os.scandir(folder):
        if not entry.is_file(follow_symlinks=False):
            raise UserError(
                f"{entry.path} is not a regular file; copy the artifact again, with files and not links or folders"
            )
        sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
    for extra in sorted(sizes.keys() - {MANIFEST_FILE, SIGNATURE_FILE, *(entry.path for entry in manifest.files)}):
        raise UserError(
            f"{folder / extra} is not listed in {MANIFEST_FILE}, and an artifact holds nothing else; remove it"
        )
    for listed in manifest.files:
        path, size = folder / listed.path, sizes.get(listed.path)
        if size is None:
            raise UserError(
                f"{path} is missing, but {MANIFEST_FILE} lists it; copy the artifact again or compile it again"
            )
        if size != listed.size:
            raise UserError(
                f"{path} has {size} bytes, expected {listed.size}; copy the artifact again or compile it again"
            )


def _check_weights(path: Path, manifest: Manifest) -> None:
    """Check rule 10."""
    stored = list(TensorFile.open(path).tensors.values())
    remedy = "copy the artifact again or compile it again"
    if len(stored) != len(manifest.weights):
        raise UserError(
            f"{path} holds {len(stored)} tensors, but {MANIFEST_FILE} lists {len(manifest.weights)}; {remedy}"
        )
    for i, (found, expected) in enumerate(zip(stored, manifest.weights, strict=True)):
        if (found.name, found.dtype, found.shape) != (expected.name, expected.dtype, expected.shape):
            raise UserError(
                f"{path}: tensor {i} is {found.name} {found.dtype} {list(found.shape)}, but {MANIFEST_FILE} lists "
                f"{expected.name} {expected.dtype} {list(expected.shape)}; {remedy}"
            )
        if found.offset % ALIGNMENT:
            raise UserError(
                f"{path}: {found.name} begins at byte {found.offset}, expected a multiple of {ALIGNMENT}; {remedy}"
            )


def sealed_library(folder: Path, manifest: Manifest, level: CpuLevel) -> Path:
    """A copy of a folder's library for a CPU level, with its sum in the manifest's list, that nothing can change."""
    name = library_file(manifest.target, level)
    entry = next(entry for entry in manifest.files if entry.path == name)
    return sealed_copy(folder / name, entry)


def write_artifact(
    folder: Path,
    fill: Callable[[Path], None],
    make_manifest: Callable[[tuple[FileEntry, ...]], Manifest],
    *,
    for_this_machine: bool = True,
) -> Artifact:
    """Write an artifact so that `folder` is at every moment the old one, the new one, or (for an instant) absent.

    `fill` is given an empty folder and writes the files into it; `make_manifest` turns their entries into the manifest.
    The result is opened as a check (`for_this_machine` as in `Artifact.open`) and then renamed into place. If anything
    is raised on the way, even a keyboard interrupt, `folder` stays as it was and nothing is left beside it; what a
    killed process left behind is removed by the next call.
    """
    folder = folder.resolve()
    refuse_other_folder(folder)
    fresh = sibling(folder, "tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(folder)
        fresh.mkdir()
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written: {error.strerror}; choose another folder or fix its permissions"
        ) from error
    try:
        fill(fresh)
        manifest = make_manifest(tuple(file_entry(path) for path in sorted(fresh.iterdir())))
        (fresh / MANIFEST_FILE).write_bytes(contract.to_json(manifest))
        put_in_place(fresh, folder, for_this_machine=for_this_machine)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    return Artifact(folder, manifest)


def put_in_place(
    fresh: Path, folder: Path, *, for_this_machine: bool = True, public_key: Path | None = None, minimum_build: int = 0
) -> None:
    """Make a filled folder an artifact's folder: flush it to disk, open it as `Artifact.open` does, and rename it.

    `fresh` is a sibling of `folder`, whose artifact it replaces. Raises `UserError` as `Artifact.open` does.
    """
    for path in [*fresh.iterdir(), fresh]:
        sync(path)
    Artifact.open(fresh, for_this_machine=for_this_machine, public_key=public_key, minimum_build=minimum_build)
    swap_in(fresh, folder)


def replace_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace `manifest.json` alone, in one step, by a manifest of the same files, for example with a parity summary.

    A signature is removed.
    """
    folder = folder.resolve()
    assert manifest.files == read_manifest(folder).files, "a manifest of other files needs write_artifact"
    check_manifest(manifest, str(folder / MANIFEST_FILE))
    # Written outside the folder, in which readers reject extra files.
    with replaced_whole(folder / MANIFEST_FILE, sibling(folder, "manifest")) as fresh:
        fresh.write_bytes(contract.to_json(manifest))
        (folder / SIGNATURE_FILE).unlink(missing_ok=True)
