"""The tensors of an artifact's weight file: stored tensors in the layouts that one target's kernels read.

Does not load TVM.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from export.weights.format import SCALE_SUFFIX, ZERO_POINT_SUFFIX, Array, ModelTensor
from export.weights.panels import to_panels
from export.weights.table import EXPERTS, packing_of
from export.weights.table import specs as stored_specs
from runtime.artifact.layouts import PANEL, ROW_MAJOR
from runtime.artifact.manifest import WeightSpec
from runtime.artifact.targets import TARGETS, TargetKind


@dataclass(frozen=True)
class PackedTensor:
    """One tensor of the artifact, and how rows of it are packed."""

    spec: WeightSpec
    rows: int  # of one of the stacked matrices, as stored
    stacked: int
    pack: Callable[[Array, int], Array] | None  # rows, workers -> panels; None for row_major


def packed_tensors(tensor: ModelTensor, n_experts: int, kind: TargetKind) -> tuple[PackedTensor, ...]:
    """The tensors that an artifact for one kind of target stores for one tensor of the model, in the kernels' order."""
    specs = stored_specs(tensor)
    if len(tensor.shape) == 1:
        spec = WeightSpec(name=tensor.name, shape=tensor.shape, dtype=specs[0].dtype, layout=ROW_MAJOR)
        return (PackedTensor(spec, tensor.shape[0], 1, None),)
    stacked = n_experts if EXPERTS in tensor.name else 1
    n, k = tensor.shape[0] // stacked, tensor.shape[1]
    packing = packing_of(tensor.stored, TARGETS[kind].layout)
    layout = packing.layout(tensor.stored, n, k)
    name = layout.name + (f"x{stacked}" if stacked > 1 else "")
    main = _spec(tensor.name, (stacked * layout.shape[0], *layout.shape[1:]), layout.dtype, name)
    found = [PackedTensor(main, n, stacked, partial(packing.pack, tensor.stored))]
    for part, suffix in ((layout.scales, SCALE_SUFFIX), (layout.zero_points, ZERO_POINT_SUFFIX)):
        if part is not None:
            size, dtype = part
            grouped = len(size) > 1
            shape = size if grouped else (stacked * n,)
            spec = _spec(tensor.name + suffix, shape, dtype, f"panels_{PANEL}" if grouped else ROW_MAJOR)
            found.append(PackedTensor(spec, n, stacked, to_panels if grouped else None))
    return tuple(found)


def _spec(name: str, shape: tuple[int, ...], dtype: str, layout: str) -> WeightSpec:
    return WeightSpec(name=name, shape=shape, dtype=dtype, layout=layout)  # type: ignore[arg-type]
