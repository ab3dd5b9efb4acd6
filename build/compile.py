"""A whole compile: run what is stale, reuse what is not. Export runs in a process of its own, so that torch's memory is gone before the build."""

import subprocess
import sys
from functools import partial
from pathlib import Path

from build.packing.layout import RING_BLOCK, ring_block
from build.pipeline import build_key, build_library, package
from build.tvm_stage.cuda import spilling, usage_of
from build.tvm_stage.target import target_spec
from export.configuration.config import CompileConfig, artifact_dir
from export.console import console
from export.onnx_graphs.graphs import GraphsRecord, OnnxGraphs
from export.plan import export_key, workspace_of
from export.stage import locked, run_stage, stage_folder
from runtime.artifact.folder import Artifact
from runtime.errors import UserError

SLOW_BLOCK = 8  # slots: fewer do not fill a register of AVX2


def compile_config(config: CompileConfig, path: Path, overrides: list[str], dump: Path | None) -> Artifact:
    """The artifact of a config, made or found; raises `UserError` for what a person can mend."""
    artifact = artifact_dir(path)
    workspace = workspace_of(config, artifact)
    with locked(workspace, console.print):
        spec = target_spec(config.backend)
        graphs = exported_graphs(config, path, overrides, dump)
        key = build_key(graphs, spec)
        current = existing_artifact(artifact, key)
        if current is not None and dump is None:
            return current
        if dump is not None:  # a dump shows a run, so the library is made again
            dump.mkdir(parents=True, exist_ok=True)
            build_library(graphs, spec, dump, dump)
        for note in slow_rings(graphs.record) if spec.kind == "llvm" else ():
            console.print(f"warning: {note}", style="yellow")
        library = run_stage(workspace, "library", key, partial(build_library, graphs, spec, dump=None))
        for note in spilling(usage_of(library)):
            console.print(f"warning: {note}", style="yellow")
        return current or package(config, graphs, spec, library, key, artifact)


def slow_rings(record: GraphsRecord) -> list[str]:
    """A sentence where layers without a window have a cache that the CPU's attention reads slowly."""
    length = record.shape.cache_len
    if all(record.model.sliding_window) or length < RING_BLOCK or ring_block(length) >= SLOW_BLOCK:
        return []
    return [
        f"shape.cache_len is {length}, and caches of that length are read in blocks of {ring_block(length)} slots, several times slower than in "
        f"blocks of {RING_BLOCK}; set it to {-(-length // RING_BLOCK) * RING_BLOCK}"
    ]


def exported_graphs(config: CompileConfig, path: Path, overrides: list[str], dump: Path | None = None) -> OnnxGraphs:
    """The config's exported graphs; runs `python -m export` when they are missing or stale."""
    folder = stage_folder(workspace_of(config, artifact_dir(path)), "graphs", export_key(config))
    if not folder.is_dir() or dump is not None:
        command = [sys.executable, "-m", "export", str(path), *(f"--set={text}" for text in overrides)]
        status = subprocess.run(command + (["--dump", str(dump)] if dump else []), check=False).returncode
        if status != 0:
            raise UserError(f"the export stage ended with status {status}; its own message is above")
    return OnnxGraphs.open(folder)


def existing_artifact(folder: Path, key: str) -> Artifact | None:
    """The artifact in `folder`, when it is whole and was made from this very key."""
    if not (folder / "manifest.json").is_file():
        return None
    try:
        artifact = Artifact.open(folder, for_this_machine=False)
    except UserError:
        return None  # damaged or of an older format: it is made again
    return artifact if artifact.manifest.build_key == key else None
