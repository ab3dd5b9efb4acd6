"""TVM's runtime without its compiler: `tvm_ffi`, libtvm_runtime, and a compiled library opened as a virtual machine."""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from runtime.errors import UserError

RUNTIME_LIBRARY = "libtvm_runtime.so"
CPU_DEVICE, CUDA_DEVICE = (1, 0), (2, 0)  # kind and number
POOLED_ALLOCATOR = 2
# Passes in which an idle worker of TVM's pool yields the processor before it sleeps: about a millisecond where nothing
# else runs, longer than the pauses within a step. TVM's own 300000 also keep a process from ending until they are
# over, which on a busy machine, where every pass lets others run, takes minutes.
IDLE_PASSES = 5000


def import_ffi() -> Any:  # noqa: ANN401 (a module)
    """Import `tvm_ffi`; torch, if installed, is hidden during the import, which would otherwise load all of it."""
    if "tvm_ffi" in sys.modules or "torch" in sys.modules:
        import tvm_ffi

        return tvm_ffi
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm_ffi
    finally:
        del sys.modules["torch"]
    return tvm_ffi


def load_runtime(threads: int) -> Any:  # noqa: ANN401
    """Import `tvm_ffi`, load TVM's runtime and set its thread pool to `threads`.

    Raises `UserError` if the runtime is not installed.
    """
    # both are read once, at the pool's first use
    os.environ["TVM_NUM_THREADS"] = str(threads)
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", str(IDLE_PASSES))
    ffi = import_ffi()
    # if the function exists, the compiler, which contains the runtime, is already loaded
    if ffi.get_global_func("vm.builtin.reshape", allow_missing=True) is None:
        ctypes.CDLL(str(find_library(RUNTIME_LIBRARY)), ctypes.RTLD_GLOBAL)
    return ffi


def find_library(name: str) -> Path:
    """A shared library of the runtime: in this package's lib/ (as shipped), or in packages of a compile host."""
    folders = [Path(__file__).parents[1] / "lib"]
    spec = importlib.util.find_spec("tvm")
    if spec is not None and spec.origin is not None:
        folders += [Path(spec.origin).parent, Path(spec.origin).parent / "lib"]
    with suppress(PackageNotFoundError):
        folders += [
            Path(str(file.locate())).parent
            for file in distribution("nvidia-cuda-runtime").files or ()
            if file.name == name
        ]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    raise UserError(
        f"{name} was not found in {', '.join(map(str, folders))}; "
        "use the runtime folder that was shipped, or run `make setup`"
    )


def open_library(ffi: Any, path: Path) -> Any:  # noqa: ANN401
    """Load a compiled library, and keep it loaded; `path` may be one of a file in memory, which has no suffix."""
    library = ffi.get_global_func("ffi.Module.load_from_file.so")(str(path.absolute()), "so")
    ffi.get_global_func("ffi.ModuleGlobalsAdd")(library)
    return library


def kernel_of(library: Any, name: str) -> Callable[..., Any]:  # noqa: ANN401
    """A kernel of an open library, to be called with its tensors."""
    kernel: Callable[..., Any] = library.imports[0][name]
    return kernel


def start_machine(library: Any, *devices: tuple[int, int]) -> Any:  # noqa: ANN401
    """Start an open library's virtual machine on these devices, the host's last; its functions are items by name."""
    machine = library["vm_load_executable"]()
    machine["vm_initialization"](*(part for device in devices for part in (*device, POOLED_ALLOCATOR)))
    return machine
