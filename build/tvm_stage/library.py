"""From ONNX graphs to shared libraries, in three named steps: import, dispatch, lower."""

from pathlib import Path

from build.tvm_stage.dispatch import DispatchedModule, dispatch
from build.tvm_stage.importer import import_graphs
from build.tvm_stage.level_libraries import write_libraries
from build.tvm_stage.lower import dump_module, with_passes, write_library
from export.console import step_bar
from export.onnx_graphs.graphs import OnnxGraphs
from runtime.artifact.consistency import LIBRARY_FILE
from runtime.artifact.manifest import TargetSpec

REPORT_FILE = "dispatch.json"  # beside the library: which kernel serves which region
CALLS_FILE = "calls.json"  # beside the library: what each kernel computes


def compile_libraries(graphs: OnnxGraphs, spec: TargetSpec, folder: Path, dump: Path | None) -> DispatchedModule:
    """Compile all graphs for one target, into one library for each CPU level that changes a kernel.

    `dump` receives the module after each step, with the kernels of the lowest level.
    """
    with step_bar("compiling", 2 + len(spec.levels)) as bar:
        imported = import_graphs(graphs)
        dump_module(imported.module, dump, "1-import")
        bar.advance(1)
        dispatched = dispatch(imported, spec)
        dump_module(dispatched.module, dump, "2-dispatch")
        bar.advance(1)
        module = with_passes(dispatched, spec, dump)
        if spec.better_levels:
            write_libraries(module, dispatched.kernels, spec, folder, lambda: bar.advance(1))
        else:
            write_library(module, spec, folder / LIBRARY_FILE, dump)
            bar.advance(1)
    return dispatched
