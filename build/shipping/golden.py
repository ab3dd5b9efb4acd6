"""Golden prompts in an artifact: the answers that it must give wherever it is shipped.

`runtime.verify` replays them there.
"""

import os
import shutil
from pathlib import Path

import msgspec

from export.job import Job
from export.results import GOLDEN_STAGE, golden_key
from export.workspace import is_whole, stage_folder
from runtime.artifact.consistency import MANIFEST_FILE
from runtime.artifact.folder import Artifact, write_artifact
from runtime.artifact.golden import GOLDEN_FILE
from runtime.artifact.hashing import file_entry
from runtime.artifact.manifest import FileEntry, Manifest
from runtime.artifact.signing import SIGNATURE_FILE


def with_golden(artifact: Artifact, job: Job) -> Artifact:
    """The artifact with golden prompts inside; unless they exist already, torch computes them in its own process.

    The caller holds the workspace.
    """
    folder = stage_folder(job.workspace, GOLDEN_STAGE, golden_key(job.config))
    if not is_whole(folder):
        job.start("export.golden")
    golden = folder / GOLDEN_FILE
    return artifact if file_entry(golden) in artifact.manifest.files else add_golden(artifact, golden)


def add_golden(artifact: Artifact, golden: Path) -> Artifact:
    """Rewrite the artifact in place with a file of golden prompts; its other files are linked, not copied."""

    def fill(folder: Path) -> None:
        for entry in artifact.folder.iterdir():
            if entry.name not in (MANIFEST_FILE, SIGNATURE_FILE, GOLDEN_FILE):
                os.link(entry, folder / entry.name)
        shutil.copyfile(golden, folder / GOLDEN_FILE)

    def manifest(files: tuple[FileEntry, ...]) -> Manifest:
        return msgspec.structs.replace(artifact.manifest, files=files, golden=GOLDEN_FILE)

    return write_artifact(artifact.folder, fill, manifest, for_this_machine=False)
