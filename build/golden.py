"""Golden prompts into an artifact: what it must answer wherever it is shipped to. `runtime.verify` replays them there."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec

from export.config import CompileConfig, artifact_dir
from export.plan import workspace_of
from runtime.artifact import Artifact, write_artifact
from runtime.consistency import MANIFEST_FILE
from runtime.errors import UserError
from runtime.golden import GOLDEN_FILE
from runtime.manifest import FileEntry, Manifest
from runtime.signature import SIGNATURE_FILE


def with_golden(artifact: Artifact, config: CompileConfig, path: Path, overrides: list[str]) -> Artifact:
    """The artifact with golden prompts inside; they are computed by torch, in a process of its own, unless they are there already."""
    if artifact.manifest.golden is not None:
        return artifact
    status = subprocess.run([sys.executable, "-m", "export.golden", str(path), *(f"--set={text}" for text in overrides)], check=False).returncode
    if status != 0:
        raise UserError(f"the golden prompts ended with status {status}; the message is above")
    return add_golden(artifact, workspace_of(config, artifact_dir(path)) / GOLDEN_FILE)


def add_golden(artifact: Artifact, golden: Path) -> Artifact:
    """The artifact again, in the same place, with a file of golden prompts beside its other files, which are not copied."""

    def fill(folder: Path) -> None:
        for entry in artifact.folder.iterdir():
            if entry.name not in (MANIFEST_FILE, SIGNATURE_FILE, GOLDEN_FILE):
                os.link(entry, folder / entry.name)
        shutil.copyfile(golden, folder / GOLDEN_FILE)

    def manifest(files: tuple[FileEntry, ...]) -> Manifest:
        return msgspec.structs.replace(artifact.manifest, files=files, golden=GOLDEN_FILE)

    return write_artifact(artifact.folder, fill, manifest, for_this_machine=False)
