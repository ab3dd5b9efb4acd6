"""The build stage: ONNX graphs to a compiled library, and library plus weights to an artifact."""

import os
import shutil
from dataclasses import asdict
from pathlib import Path

import msgspec

from build.packing.pack import pack_weights, packed
from build.tvm_stage import cuda
from build.tvm_stage.dispatch import DispatchedModule, ReportRow, dispatch
from build.tvm_stage.importer import import_graphs
from build.tvm_stage.lower import dump_module, lower
from export.configuration.config import CompileConfig
from export.console import step_bar
from export.onnx_graphs.graphs import GraphsRecord, OnnxGraphs
from export.stage import stage_key, tool_versions
from runtime.artifact.consistency import LIBRARY_FILE, WEIGHTS_FILE
from runtime.artifact.folder import Artifact, write_artifact
from runtime.artifact.manifest import SCHEMA_VERSION, FileEntry, KernelCall, Manifest, TargetSpec
from runtime.engines.cpu import missing_features

BUILD_TOOLS = ("apache-tvm", "apache-tvm-ffi", "onnx", "numpy")
REPORT_FILE = "dispatch.json"
CALLS_FILE = "calls.json"


def build_key(graphs: OnnxGraphs, spec: TargetSpec) -> str:
    """Identifies a library and the artifact around it: the graphs, the target, our code and the tools."""
    inputs = {"graphs": graphs.folder.name, "target": msgspec.to_builtins(spec)}
    return stage_key(inputs, "build.pipeline", build_tools(spec))


def build_tools(spec: TargetSpec) -> tuple[str, ...]:
    """Distributions whose versions an artifact depends on and records."""
    return (*BUILD_TOOLS, *(cuda.PACKAGES if spec.kind == "cuda" else ()))


def build_library(graphs: OnnxGraphs, spec: TargetSpec, folder: Path, dump: Path | None) -> None:
    """Fill `folder` with the library and the dispatch report."""
    with step_bar("compiling", 3) as bar:
        imported = import_graphs(graphs)
        dump_module(imported.module, dump, "1-import")
        bar.advance(1)
        dispatched = dispatch(imported, spec)
        dump_module(dispatched.module, dump, "2-dispatch")
        bar.advance(1)
        lower(dispatched, spec, folder / LIBRARY_FILE, dump)
        bar.advance(1)
    _write_results(dispatched, folder)


def _write_results(dispatched: DispatchedModule, folder: Path) -> None:
    (folder / REPORT_FILE).write_bytes(msgspec.json.encode([asdict(row) for row in dispatched.report]))
    (folder / CALLS_FILE).write_bytes(msgspec.json.encode(dispatched.calls))


def read_report(folder: Path) -> list[ReportRow]:
    """The dispatch report of a compiled library."""
    return msgspec.json.decode((folder / REPORT_FILE).read_bytes(), type=list[ReportRow])


def package(
    config: CompileConfig, graphs: OnnxGraphs, spec: TargetSpec, library: Path, key: str, artifact: Path
) -> Artifact:
    """Pack the weights and write the artifact, complete or not at all."""
    tensors = packed(graphs.record, spec.kind)

    def fill(folder: Path) -> None:
        shutil.copyfile(library / LIBRARY_FILE, folder / LIBRARY_FILE)
        for path in graphs.files_for_artifact():
            shutil.copyfile(path, folder / path.name)
        pack_weights(graphs.weights(), tensors, folder / WEIGHTS_FILE, config.workspace.workers or os.cpu_count() or 1)

    def manifest(files: tuple[FileEntry, ...]) -> Manifest:
        return manifest_of(graphs.record, spec, library, key, files)

    runs_here = spec.kind == "llvm" and not missing_features(spec.cpu_features)
    return write_artifact(artifact, fill, manifest, for_this_machine=runs_here)


def manifest_of(
    record: GraphsRecord, spec: TargetSpec, library: Path, key: str, files: tuple[FileEntry, ...]
) -> Manifest:
    """The manifest of exported graphs and the folder of their compiled library."""
    is_cuda = spec.kind == "cuda"
    return Manifest(
        schema_version=SCHEMA_VERSION,
        name=record.name,
        build_key=key,
        model=record.model,
        shape=record.shape,
        quantization=record.quantization,
        target=spec,
        graphs=record.graphs,
        weights=tuple(tensor.spec for tensor in packed(record, spec.kind)),
        tokenizer=record.tokenizer,
        overrides=record.overrides,
        tools=tool_versions(build_tools(spec)),
        files=files,
        kernels=cuda.usage_of(library) if is_cuda else (),
        calls=msgspec.json.decode((library / CALLS_FILE).read_bytes(), type=tuple[KernelCall, ...]) if is_cuda else (),
    )
