"""From Relax to machine code: the target's named passes in order, then TVM's code generator."""

from pathlib import Path

from build.compiler import cc, relax, tvm
from build.tvm_stage.dispatch import DispatchedModule
from build.tvm_stage.target import TVM_TARGETS
from runtime.artifact.manifest import TargetSpec
from runtime.errors import UserError, one_line

# Debug information holds line numbers of our kernels' source. It is a third of the library, is useless on a box, and
# changes with every comment.
LINKER_OPTIONS = ["-Wl,--strip-all", "-Wl,-z,noseparate-code"]


def with_passes(dispatched: DispatchedModule, spec: TargetSpec, dump: Path | None) -> tvm.IRModule:
    """The module after all passes of its target; `dump` receives it after each group of them."""
    row = TVM_TARGETS[spec.kind]
    module = dispatched.module
    with row.make(spec), tvm.transform.PassContext(disabled_pass=list(row.skipped)):
        for number, (name, passes) in enumerate(row.passes(), start=3):
            module = tvm.transform.Sequential(list(passes))(module)
            dump_module(module, dump, f"{number}-{name}")
    return module


def write_library(module: tvm.IRModule, spec: TargetSpec, library: Path, dump: Path | None = None) -> None:
    """Compile every function of a module `with_passes` for the target's lowest CPU level, and write the library.

    Raises `UserError` if the host has no linker, if that fails, or if the library fails the target's own check.
    """
    if cc.get_cc() is None:
        raise UserError(
            "no C++ compiler was found on PATH, expected g++ or clang++ to link the library; "
            "install one (apt-get install g++)"
        )
    row = TVM_TARGETS[spec.kind]
    target = row.make(spec)
    with row.toolchain(spec, library.parent, dump), target, tvm.transform.PassContext(disabled_pass=list(row.skipped)):
        executable = relax.build(module, target, relax_pipeline=None)
    try:
        executable.export_library(str(library), options=LINKER_OPTIONS)
    except RuntimeError as error:  # what TVM raises if the linker fails, with all that the linker said
        raise UserError(
            f"{library} cannot be linked: {one_line(error)}; free some space if the disk is full, or try the C++ "
            "compiler by itself"
        ) from error
    row.check(library, spec)


def dump_module(module: tvm.IRModule, dump: Path | None, name: str) -> None:
    """Write a module as TVMScript if a folder is given."""
    if dump is not None:
        dump.mkdir(parents=True, exist_ok=True)
        (dump / f"{name}.py").write_text(module.script())
