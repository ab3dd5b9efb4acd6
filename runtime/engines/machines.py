"""How a box loads an artifact of each target, and what it checks beforehand (targets: `runtime.artifact.targets`)."""

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
    """How a box handles artifacts of one target."""

    load: Callable[[Artifact, int], LoadedArtifact]  # takes an artifact and the number of host threads
    examine: Callable[[Manifest], Iterable[Finding]]  # for `runtime.doctor`


def _load_cuda(artifact: Artifact, threads: int) -> LoadedArtifact:
    from runtime.engines import cuda  # a box without a GPU needs no part of it

    return cuda.load(artifact, threads)


MACHINES: Mapping[TargetKind, Machine] = {
    "llvm": Machine(host.load, examination.examine_host),
    "cuda": Machine(_load_cuda, examination.examine_cuda),
}
