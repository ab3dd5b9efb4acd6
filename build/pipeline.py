"""The build stage: from ONNX graphs to a compiled library, and from library and weights to an artifact."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import msgspec

from build.packing.pack import PACKED_FILE, PackedWeights, packed, packed_key
from build.tvm_stage.dispatch import ReportRow
from build.tvm_stage.library import CALLS_FILE, REPORT_FILE, compile_libraries
from build.tvm_stage.target import TVM_TARGETS
from export.job import Job
from export.onnx_graphs.graphs import GraphsRecord, OnnxGraphs
from export.results import weights_key
from export.stage import stage_key, tool_versions
from runtime.artifact.consistency import WEIGHTS_FILE, library_file
from runtime.artifact.cpu import missing_features
from runtime.artifact.folder import Artifact, write_artifact
from runtime.artifact.manifest import SCHEMA_VERSION, FileEntry, KernelCall, Manifest, TargetSpec
from runtime.artifact.targets import TARGETS

BUILD_TOOLS = ("apache-tvm", "apache-tvm-ffi", "onnx", "numpy")


def library_key(graphs: str, spec: TargetSpec) -> str:
    """Identify a library by the key of its graphs, the target, our code and the tools."""
    inputs = {"graphs": graphs, "target": msgspec.to_builtins(spec)}
    return stage_key(inputs, "build.tvm_stage.library", build_tools(spec))


def artifact_key(name: str, library: str) -> str:
    """Identify an artifact by its name, the key of its library, and the code that packages it."""
    return stage_key({"name": name, "library": library}, "build.pipeline", ())


def build_tools(spec: TargetSpec) -> tuple[str, ...]:
    """Distributions whose versions an artifact depends on and records."""
    return (*BUILD_TOOLS, *TVM_TARGETS[spec.kind].tools)


def build_library(graphs: OnnxGraphs, spec: TargetSpec, folder: Path, dump: Path | None) -> None:
    """Fill `folder` with the libraries, the dispatch report and a description of what each kernel computes."""
    dispatched = compile_libraries(graphs, spec, folder, dump)
    (folder / REPORT_FILE).write_bytes(msgspec.json.encode([asdict(row) for row in dispatched.report]))
    (folder / CALLS_FILE).write_bytes(msgspec.json.encode(dispatched.calls))


def read_report(folder: Path) -> list[ReportRow]:
    """The dispatch report of a compiled library."""
    return msgspec.json.decode((folder / REPORT_FILE).read_bytes(), type=list[ReportRow])


def package(job: Job, graphs: OnnxGraphs, spec: TargetSpec, library: Path, key: str) -> Artifact:
    """Write the artifact, complete or not at all.

    Weights that the previous artifact packed in the same way are not packed again.
    """
    tensors, compiled = packed(graphs.record, spec.kind), compiled_levels(spec, library)
    weights = PackedWeights(
        graphs.weights(),
        tensors,
        packed_key(weights_key(job.config), tensors),
        before=job.artifact / WEIGHTS_FILE,
        note=job.workspace / PACKED_FILE,
        workers=job.config.workspace.workers or os.cpu_count() or 1,
    )

    def fill(folder: Path) -> None:
        for level in compiled.levels:
            name = library_file(compiled, level)
            shutil.copyfile(library / name, folder / name)
        for path in graphs.files_for_artifact():
            shutil.copyfile(path, folder / path.name)
        weights.put(folder / WEIGHTS_FILE)

    def manifest(files: tuple[FileEntry, ...]) -> Manifest:
        return manifest_of(job.config.name, graphs.record, compiled, library, key, files)

    runs_here = not TARGETS[spec.kind].on_device and not missing_features(spec.cpu_features)
    return write_artifact(job.artifact, fill, manifest, for_this_machine=runs_here)


def compiled_levels(spec: TargetSpec, library: Path) -> TargetSpec:
    """The target with those CPU levels that have a library in a folder that `build_library` filled."""
    better = tuple(level for level in spec.better_levels if (library / library_file(spec, level)).exists())
    return msgspec.structs.replace(spec, better_levels=better)


def manifest_of(
    name: str, record: GraphsRecord, spec: TargetSpec, library: Path, key: str, files: tuple[FileEntry, ...]
) -> Manifest:
    """Build the manifest from the record of the exported graphs and the folder of their compiled library."""
    calls = msgspec.json.decode((library / CALLS_FILE).read_bytes(), type=tuple[KernelCall, ...])
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=name,
        build_key=key,
        model=record.model,
        shape=record.shape,
        quantization=record.quantization,
        target=spec,
        functions=record.functions,
        weights=tuple(tensor.spec for tensor in packed(record, spec.kind)),
        tokenizer=record.tokenizer,
        overrides=record.overrides,
        tools=tool_versions(build_tools(spec)),
        files=files,
        kernels=TVM_TARGETS[spec.kind].usage(library),
        calls=calls if TARGETS[spec.kind].on_device else (),
    )
