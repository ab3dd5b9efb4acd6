"""The tensors of an artifact's weight file: stored tensors in the layouts that one target's kernels read.

Does not load TVM.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from export.weights.format import Array, ModelTensor
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
    parts = [part for part in (layout.scales, layout.offsets, layout.order) if part is not None]
    for beside, (size, dtype) in zip(specs[1:], parts, strict=True):
        by_groups = len(size) > 1  # panels for each matrix; a scale for each row of all matrices, or an order
        shape = (stacked * size[0], *size[1:])
        spec = _spec(beside.name, shape, dtype, f"panels_{PANEL}" if by_groups else ROW_MAJOR)
        found.append(PackedTensor(spec, n, stacked, to_panels if by_groups else None))
    return tuple(found)


def _spec(name: str, shape: tuple[int, ...], dtype: str, layout: str) -> WeightSpec:
    return WeightSpec(name=name, shape=shape, dtype=dtype, layout=layout)  # type: ignore[arg-type]
