"""Traces layers of one shape once and connects the copies by hand.

Tracing thirty equal layers would take thirty times as long for the same nodes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from runtime.artifact.manifest import Signature, TensorSpec
from runtime.artifact.tensor_file import numpy_dtype


@dataclass(frozen=True)
class Parts:
    """Traced parts of one graph: the part before the layers, one layer for each cache length, and the part after."""

    # input_ids, position_ids -> x, a mask for each distinct cache length, ascending, and the rotation for all layers
    begin: ir.Model
    blocks: Mapping[int, ir.Model]  # by cache length: x, mask, rotation, a layer's caches -> x, new caches
    finish: ir.Model  # x -> the head's outputs


def stitch(parts: Parts, cache_lens: Sequence[int], signature: Signature) -> ir.Model:
    """The whole graph: `begin`, a copy of the matching block for each layer under that layer's names, and `finish`."""
    inputs = [_declare(spec) for spec in signature.inputs]
    call, caches = inputs[: len(signature.call)], inputs[len(signature.call) :]
    graph = ir.Graph(inputs, [], nodes=[], opset_imports=dict(parts.begin.graph.opset_imports), name="mistral")
    x, *shared = _append(graph, parts.begin.graph, call, "begin", str)
    masks, rotation = shared[: len(parts.blocks)], shared[len(parts.blocks) :]
    mask_of = dict(zip(sorted(parts.blocks), masks, strict=True))
    present: list[ir.Value] = []
    each = len(caches) // len(cache_lens)  # caches of one layer
    for i, cache_len in enumerate(cache_lens):
        arguments = [x, mask_of[cache_len], *rotation, *caches[each * i : each * (i + 1)]]
        x, *new = _append(
            graph,
            parts.blocks[cache_len].graph,
            arguments,
            f"layers.{i}",
            f"layers.{i}.{{}}".format,
            f"block_{cache_len}",
        )
        present += new
    outputs = [*_append(graph, parts.finish.graph, [x], "finish", str), *present]
    for value, spec in zip(outputs, signature.outputs, strict=True):
        value.name = spec.name
    graph.outputs.extend(outputs)
    return ir.Model(graph, ir_version=parts.begin.ir_version)


def _declare(spec: TensorSpec) -> ir.Value:
    dtype = ir.DataType.from_numpy(numpy_dtype(spec.dtype))
    return ir.Value(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(dtype))


def _append(
    graph: ir.Graph,
    part: ir.Graph,
    arguments: Sequence[ir.Value],
    scope: str,
    weight_name: Callable[[str], str],
    constants: str | None = None,
) -> list[ir.Value]:
    """Append copies of a part's nodes to `graph`, fed with `arguments`, and return the copies of the part's outputs.

    Initializers without data are weights, renamed by `weight_name`; those with data are constants, which are named
    after `constants` and shared by all copies of the part.
    """
    new: dict[ir.Value, ir.Value] = dict(zip(part.inputs, arguments, strict=True))
    for name, value in part.initializers.items():
        own = weight_name(name) if value.const_value is None else f"{constants or scope}.{name}"
        if own not in graph.initializers:
            graph.initializers[own] = ir.Value(
                name=own, shape=value.shape, type=value.type, const_value=value.const_value
            )
        new[value] = graph.initializers[own]
    for node in part:
        inputs = [None if value is None else new[value] for value in node.inputs]
        copy = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            node.attributes.values(),
            num_outputs=len(node.outputs),
            name=f"{scope}.{node.name}",
        )
        for old, value in zip(node.outputs, copy.outputs, strict=True):
            value.name, value.shape, value.type = f"{scope}.{old.name}", old.shape, old.type
            new[old] = value
        graph.append(copy)
    return [new[value] for value in part.outputs]
