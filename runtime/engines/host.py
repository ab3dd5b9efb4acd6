"""Artifacts in the host's memory."""

import mmap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.artifact.folder import Artifact
from runtime.artifact.manifest import TensorSpec
from runtime.artifact.tensor_file import bits_dtype, tensor_bytes
from runtime.engines.cpu_level import chosen_level
from runtime.engines.huge_pages import VARIABLE, in_huge_pages, wants_huge_pages
from runtime.engines.loaded_artifact import SMALLER, LoadedArtifact
from runtime.engines.tvm_runtime import CPU_DEVICE, load_runtime, open_library, start_machine
from runtime.errors import UserError
from runtime.process_memory import machine_memory

ALIGNMENT = 64  # bytes; generated code assumes it of every tensor and does not check


def load(opened: Artifact, threads: int) -> LoadedArtifact:
    """Load an artifact into this process.

    The weights are mapped, or copied into huge pages (`huge_pages.py`), the caches are new, and the compiled functions
    read and write their arrays in place.
    """
    manifest = opened.manifest
    level = chosen_level(manifest.target.levels)
    huge_pages = wants_huge_pages()
    copied = sum(map(tensor_bytes, manifest.weights)) if huge_pages else 0
    check_memory(sum(map(tensor_bytes, manifest.caches)), copied)
    ffi = load_runtime(threads)
    machine = start_machine(open_library(ffi, opened.sealed_library(level)), CPU_DEVICE)
    arrays = _copied_weights(opened) if huge_pages else opened.weights()
    weights = [_tensor(ffi, arrays[spec.name]) for spec in manifest.weights]
    caches = [_aligned(spec) for spec in manifest.caches]
    cache_tensors = [_tensor(ffi, cache) for cache in caches]
    functions = {}
    for function in manifest.functions:
        inputs = {spec.name: _aligned(spec) for spec in function.signature.call}
        arguments = [*(_tensor(ffi, array) for array in inputs.values()), *cache_tensors, *weights]
        functions[function.name] = HostCall(inputs, machine[function.name], arguments)
    return LoadedArtifact(functions, HostCaches(caches), cpu_level=level.cpu)


def _copied_weights(opened: Artifact) -> dict[str, NDArray[Any]]:
    file = opened.weights_file()
    return file.views(in_huge_pages(file.path))


def check_memory(caches: int, copied: int = 0) -> None:
    """Raise `UserError` if caches, and weights that are copied, have more bytes than the machine.

    A process that fills them would be killed.
    """
    memory = machine_memory()
    if caches + copied > memory:
        what = "caches, and the weights in huge pages," if copied else "caches"
        remedy = f"unset {VARIABLE}, use a larger machine, or" if copied else "use a larger machine, or"
        raise UserError(
            f"the {what} take {(caches + copied) / 1e9:,.1f} GB, but this machine has {memory / 1e9:,.1f} GB of "
            f"memory; {remedy} {SMALLER}"
        )


@dataclass(frozen=True)
class HostCall:
    """A compiled function bound to arguments whose memory stays the same."""

    inputs: Mapping[str, NDArray[np.int64]]
    function: Callable[..., Any]
    arguments: Sequence[Any]

    def __call__(self) -> NDArray[np.float32]:
        """The outputs (B, T or 1, n_outputs), in memory that the next call reuses."""
        return np.asarray(np.from_dlpack(self.function(*self.arguments)), np.float32)


@dataclass(frozen=True)
class HostCaches:
    """Rings as arrays (slots, n_kv_heads, columns, width); keys are interleaved within whole blocks of columns."""

    rings: Sequence[NDArray[Any]]

    def copy(self, source: int, target: int, columns: int) -> None:
        """As `runtime.engines.loaded_artifact.Caches.copy`."""
        for ring in self.rings:
            ring[target, :, :columns] = ring[source, :, :columns]

    def read(self, slot: int, columns: int) -> list[NDArray[Any]]:
        """As `runtime.engines.loaded_artifact.Caches.read`."""
        return [ring[slot, :, :columns].copy() for ring in self.rings]

    def write(self, slot: int, columns: Sequence[NDArray[Any]]) -> None:
        """As `runtime.engines.loaded_artifact.Caches.write`."""
        for ring, kept in zip(self.rings, columns, strict=True):
            ring[slot, :, : kept.shape[1]] = kept


def _aligned(spec: TensorSpec) -> NDArray[Any]:
    """A zeroed array whose data begins at a multiple of ALIGNMENT, which every page of memory does.

    numpy would ask for huge pages for a large array: the first prompt would then wait for all of each ring to be
    cleared, of which it writes a few columns (0.3 s with rings of 6 MB).
    """
    dtype = bits_dtype(spec.dtype)
    nbytes = int(np.prod(spec.shape)) * dtype.itemsize
    pages = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(pages, np.uint8, nbytes).view(dtype).reshape(spec.shape)


def _tensor(ffi: Any, array: NDArray[Any]) -> Any:  # noqa: ANN401
    """A tensor that shares the array's memory."""
    return ffi.from_dlpack(array, require_alignment=ALIGNMENT, require_contiguous=True)
