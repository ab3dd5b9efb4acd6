"""From ONNX graphs to a shared library, in three named steps: import, dispatch, lower."""

from pathlib import Path

from build.tvm_stage.dispatch import DispatchedModule, dispatch
from build.tvm_stage.importer import import_graphs
from build.tvm_stage.lower import dump_module, lower
from export.console import step_bar
from export.onnx_graphs.graphs import OnnxGraphs
from runtime.artifact.manifest import TargetSpec

REPORT_FILE = "dispatch.json"  # beside the library: which kernel serves which region
CALLS_FILE = "calls.json"  # beside the library: what each kernel computes


def compile_library(graphs: OnnxGraphs, spec: TargetSpec, library: Path, dump: Path | None) -> DispatchedModule:
    """Compile all graphs into one library for one target; `dump` receives the module after each step."""
    with step_bar("compiling", 3) as bar:
        imported = import_graphs(graphs)
        dump_module(imported.module, dump, "1-import")
        bar.advance(1)
        dispatched = dispatch(imported, spec)
        dump_module(dispatched.module, dump, "2-dispatch")
        bar.advance(1)
        lower(dispatched, spec, library, dump)
        bar.advance(1)
    return dispatched
