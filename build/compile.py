"""A whole compile: run the stages that are stale and reuse the rest.

Export runs in its own process, so that torch's memory is released before the build.
"""

from functools import partial
from pathlib import Path

from build.pipeline import artifact_key, build_library, library_key, package
from build.tvm_stage.cuda import spilling
from build.tvm_stage.target import TVM_TARGETS, target_spec
from export.console import console
from export.job import Job
from export.onnx_graphs.graphs import CONTENTS_SUFFIX, OnnxGraphs
from export.results import graphs_key, graphs_path
from export.workspace import is_whole, locked, run_stage
from runtime.artifact.folder import Artifact, read_manifest
from runtime.artifact.replacing import refuse_other_folder
from runtime.errors import UserError

LIBRARY_STAGE = "library"


def compile_job(job: Job, dump: Path | None = None) -> Artifact:
    """Compile a job's artifact, or find it up to date; raises `UserError` for problems that the user can fix."""
    with locked(job.workspace, console.print):
        return compile_held(job, dump)


def compile_held(job: Job, dump: Path | None = None) -> Artifact:
    """`compile_job` for a caller that holds the workspace, because it goes on to use the artifact's files."""
    refuse_other_folder(job.artifact)
    spec = target_spec(job.config.backend)
    key = library_key(graphs_key(job.config), spec)
    current = existing_artifact(job.artifact, artifact_key(job.config.name, key))
    if current is not None and dump is None:
        return current
    graphs = exported_graphs(job, dump)
    if dump is not None:  # a dump shows an actual run, so the library is built again
        dump.mkdir(parents=True, exist_ok=True)
        build_library(graphs, spec, dump, dump)
    row = TVM_TARGETS[spec.kind]
    library = run_stage(job.workspace, LIBRARY_STAGE, key, partial(build_library, graphs, spec, dump=None))
    for note in spilling(row.usage(library)):
        console.print(f"warning: {note}", style="yellow")
    return current or package(job, graphs, spec, library, artifact_key(job.config.name, key))


def exported_graphs(job: Job, dump: Path | None = None) -> OnnxGraphs:
    """The job's exported graphs; runs `python -m export` if they are missing, stale or damaged."""
    path = graphs_path(job)
    if not (is_whole(path.parent) and is_whole(path.parent, path.with_suffix(CONTENTS_SUFFIX).name)) or dump:
        job.start("export", *(["--dump", str(dump)] if dump else []))
    return OnnxGraphs.open(path)


def existing_artifact(folder: Path, key: str) -> Artifact | None:
    """The artifact in `folder` if it has exactly this key and is whole; compares the key before it hashes gigabytes."""
    try:
        if read_manifest(folder).build_key != key:
            return None
        return Artifact.open(folder, for_this_machine=False)
    except UserError:
        return None  # missing, damaged or of an older format: it is made again
