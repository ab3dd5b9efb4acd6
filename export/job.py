"""`Job`: one compile of one config, in the form that every stage receives."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from export.configuration.config import CompileConfig, artifact_dir, load_config
from runtime.errors import UserError


@dataclass(frozen=True)
class Job:
    """A config together with the file and overrides it was read from, from which another process can load it again."""

    path: Path
    overrides: tuple[str, ...]  # in the form that `--set` takes
    config: CompileConfig

    @classmethod
    def load(cls, path: Path, overrides: Sequence[str] = ()) -> "Job":
        """Read a config; raises `UserError` as `load_config` does, or if the file's name cannot name an artifact."""
        job = cls(path, tuple(overrides), load_config(path, overrides))
        artifact_dir(path)
        return job

    def changed(self, changes: Sequence[str]) -> "Job":
        """The job with further overrides, which take precedence over its own."""
        return Job.load(self.path, [*self.overrides, *changes])

    @property
    def artifact(self) -> Path:
        """The folder that the job compiles to: `out/NAME` for `NAME.yaml`."""
        return artifact_dir(self.path)

    @property
    def workspace(self) -> Path:
        """The folder in which the job's stages keep their results."""
        return self.config.workspace.path / self.artifact.name

    def start(self, module: str, *arguments: str) -> None:
        """Run a command of this project on the job's config in its own process; raises `UserError` as `launch` does."""
        launch(module, str(self.path), *(f"--set={text}" for text in self.overrides), *arguments)


def launch(module: str, *arguments: str) -> None:
    """Run `python -m module arguments` and wait for it; raises `UserError` if it fails, after its own message."""
    status = subprocess.run([sys.executable, "-m", module, *arguments], check=False).returncode
    if status != 0:
        raise UserError(f"`python -m {module}` ended with status {status}; its own message is above")
