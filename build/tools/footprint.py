"""The footprint of a compile: the sizes of what it makes, and the memory and disk that it takes.

`python -m build.tools.plan` predicts and `python -m build` measures the same quantities, line by line.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from runtime.artifact.consistency import LIBRARY_FILE, WEIGHTS_FILE
from runtime.artifact.manifest import ModelConfig, Quantization, Shape, TargetSpec, TensorSpec
from runtime.artifact.targets import TARGETS
from runtime.artifact.tensor_file import numpy_dtype


@dataclass(frozen=True)
class Caches:
    """Bytes of the keys and values of one sequence, by the kind of layer that they belong to."""

    full_layers: int
    full_bytes: int
    window_layers: int
    window_bytes: int
    uniform_bytes: int  # if every layer kept `cache_len` slots
    sequences: int  # slots

    @property
    def sequence_bytes(self) -> int:
        """Bytes of all layers for one sequence."""
        return self.full_bytes + self.window_bytes

    @property
    def share(self) -> float:
        """Share of what a uniform full cache would take."""
        return self.sequence_bytes / self.uniform_bytes


@dataclass(frozen=True)
class Footprint:
    """Sizes in bytes; None if not measured."""

    files: Mapping[str, int]  # the artifact's files, by name
    caches: Caches
    target: TargetSpec
    box_peak: int | None  # host memory of the process that runs an llvm artifact; device memory for cuda
    export_peak: int | None  # of the export process
    build_peak: int | None  # of the build process
    workspace: int  # on disk, beside the artifact

    @property
    def artifact(self) -> int:
        """Bytes of all files of the artifact."""
        return sum(self.files.values())

    def rows(self) -> list[tuple[str, int | None]]:
        """Every quantity by name, in the order of the tables."""
        caches, device = self.caches, "GPU" if TARGETS[self.target.kind].on_device else "peak"
        order = sorted(self.files, key=lambda name: (name not in (WEIGHTS_FILE, LIBRARY_FILE), -self.files[name]))
        return [
            *((f"artifact: {name}", self.files[name]) for name in order),
            ("artifact, in all", self.artifact),
            (f"caches: {_counted(caches.full_layers, 'layer')} with full attention", caches.full_bytes),
            (f"caches: {_counted(caches.window_layers, 'layer')} with a window", caches.window_bytes),
            ("caches, a slot", caches.sequence_bytes),
            (f"caches, in all ({_counted(caches.sequences, 'slot')})", caches.sequences * caches.sequence_bytes),
            (f"box: {device} memory", self.box_peak),
            ("host: export, peak memory", self.export_peak),
            ("host: build, peak memory", self.build_peak),
            ("host: workspace on disk", self.workspace),
            ("host: workspace and artifact on disk", self.workspace + self.artifact),
        ]


def caches_of(model: ModelConfig, shape: Shape, caches: Sequence[TensorSpec]) -> Caches:
    """The caches that the functions of an artifact share."""
    full = window = uniform = 0
    each = len(caches) // model.n_layers
    for i, spec in enumerate(caches):
        _, heads, columns, width = spec.shape
        column = heads * width * numpy_dtype(spec.dtype).itemsize
        uniform += column * shape.cache_len
        if model.sliding_window[i // each] is None:
            full += column * columns
        else:
            window += column * columns
    n_full = model.sliding_window.count(None)
    return Caches(n_full, full, model.n_layers - n_full, window, uniform, shape.slots)


def table(title: str, rows: Sequence[tuple[str, int | None]], notes: Mapping[str, str]) -> Table:
    """Tabulate names, MB (1e6 bytes), and a note where there is one."""
    result = Table(
        title=title, title_justify="left", title_style="bold", box=None, show_header=False, padding=(0, 2, 0, 0)
    )
    result.add_column()
    result.add_column(justify="right")
    result.add_column()
    for name, nbytes in rows:
        result.add_row(name, "-" if nbytes is None else f"{nbytes / 1e6:,.2f} MB", notes.get(name, ""))
    return result


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")


def description(name: str, model: ModelConfig, target: TargetSpec, quantization: Quantization) -> str:
    """Describe, in one line, which model it is, how it is stored, and for which machine."""
    size = f"{model.n_layers} layers of dim {model.dim}, vocabulary {model.vocab_size}"
    machine = " ".join([target.kind, *(level.cpu for level in target.levels), *target.arch])
    return f"{name}, {size}; scheme {quantization.label}, dtype {target.dtype}; {machine}"
