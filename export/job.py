"""`Job`: one compile of one config, as every stage is handed it."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.configuration.config import CompileConfig, artifact_dir, load_config
from runtime.errors import UserError


@dataclass(frozen=True)
class Job:
    """A config with the file and the overrides that it was read from, which is what a stage in a process of its own is started with."""

    path: Path
    overrides: tuple[str, ...]  # as `--set` takes them
    config: CompileConfig

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> "Job":
        """Read a config; raises `UserError` as `load_config` does, and for a name that makes no artifact's folder."""
        job = cls(path, tuple(overrides), load_config(path, overrides))
        artifact_dir(path)
        return job

    def changed(self, changes: Sequence[str]) -> "Job":
        """The job with more overrides, which win over its own."""
        return Job.load(self.path, [*self.overrides, *changes])

    @property
    def artifact(self) -> Path:
        """The folder that the job compiles to: `out/NAME` for `NAME.yaml`."""
        return artifact_dir(self.path)

    @property
    def workspace(self) -> Path:
        """Where the job's stages keep their results."""
        return self.config.workspace.path / self.artifact.name

    def start(self, module: str, *arguments: str) -> None:
        """Run a command of this project on the job's config, in a process of its own; `UserError` when it fails, after its own message."""
        launch(module, str(self.path), *(f"--set={text}" for text in self.overrides), *arguments)


def launch(module: str, *arguments: str) -> None:
    """Run `python -m module arguments` and wait for it; `UserError` when it fails, after its own message."""
    status = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    if status != 0:
        raise UserError(f"`python -m {module}` ended with status {status}; its own message is above")
