"""Machines: how a box loads an artifact of each target, and what it examines before. What a target is: `runtime.artifact.targets`."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from runtime.artifact.folder import Artifact
from runtime.artifact.manifest import Manifest
from runtime.artifact.targets import TargetKind
from runtime.engines import examination, host
from runtime.engines.finding import Finding
from runtime.engines.loaded_artifact import LoadedArtifact


@dataclass(frozen=True)
class Machine:
    """What a box does with artifacts of one target."""

    load: Callable[[Artifact, int], LoadedArtifact]  # with a number of host threads
    examine: Callable[[Manifest], Iterable[Finding]]  # for `runtime.doctor`


def _load_cuda(artifact: Artifact, threads: int) -> LoadedArtifact:
    from runtime.engines import cuda  # no part of which a box without a GPU needs

    return cuda.load(artifact, threads)


MACHINES: Mapping[TargetKind, Machine] = {
    "llvm": Machine(host.load, examination.examine_host),
    "cuda": Machine(_load_cuda, examination.examine_cuda),
}
