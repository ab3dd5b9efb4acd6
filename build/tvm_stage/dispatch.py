"""Dispatch: replace every region that a rule recognizes with a call to our kernel.

Whatever no rule recognizes gets TVM's default schedule, and is reported.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from build.compiler import relax, tvm
from build.kernels.table import Kernels, kernels_of
from build.packing.layout import packed_tensors
from build.packing.pack import packed_weights
from build.rules.context import Context, GraphWeight, Region
from build.rules.dataflow import Dataflow, Expr, NoMatch, dtype, is_call, shape, variables
from build.rules.table import RULES
from build.tvm_stage.importer import RelaxModule
from export.onnx_graphs.graphs import GraphsRecord
from export.weights.table import EXPERTS, specs
from runtime.artifact.manifest import (
    COLUMN,
    SLOTS,
    Function,
    Graph,
    KernelCall,
    Signature,
    TargetSpec,
    TensorSpec,
    WeightSpec,
)
from runtime.artifact.targets import TargetKind
from runtime.artifact.tensor_file import bits_dtype, tensor_bytes
from runtime.errors import UserError

DEFAULT_SCHEDULE = "TVM default schedule"
IN_PLACE_NEW = -1  # stands for "a new tensor" in call_tir_inplace


@dataclass(frozen=True)
class ReportRow:
    """One kernel call of one graph: where it is, and its minimum bytes and operations."""

    graph: str
    op: str
    label: str
    kernel: str
    bytes: int
    flops: int


@dataclass(frozen=True)
class KernelSource:
    """What a kernel in a library was made from, so that it can be made for another CPU level."""

    name: str  # in the library
    op: str  # a row of `build.kernels.table`
    arguments: tuple[Any, ...]  # of the function that makes it


@dataclass(frozen=True)
class DispatchedModule:
    """A module whose functions call our kernels, take packed weights, update rings in place and return only logits."""

    source: RelaxModule
    module: tvm.IRModule
    weights: tuple[WeightSpec, ...]
    report: tuple[ReportRow, ...]
    calls: tuple[KernelCall, ...]
    kernels: tuple[KernelSource, ...]


def dispatch(relax_module: RelaxModule, target: TargetSpec) -> DispatchedModule:
    """Rewrite every graph, with kernels for the target's lowest CPU level.

    Raises `UserError` if one keeps a cache that no attention kernel owns.
    """
    builder = relax.BlockBuilder()
    kernels = _MadeKernels(builder, kernels_of(target))
    report: list[ReportRow] = []
    record = relax_module.record
    for graph, compiled in zip(record.graphs, record.functions, strict=True):
        function = relax_module.module[graph.name]
        weights = weights_of(record, function, graph, target.kind)
        boundary = Boundary.of(function, graph, compiled)
        regions = find_regions(relax_module, graph, weights, boundary)
        emitted = _rewrite(builder, kernels, function, regions, weights, boundary)
        report += [ReportRow(graph.name, r.op, r.label, kernels.name(r), r.bytes, r.flops) for r in emitted.regions]
        report += [
            ReportRow(graph.name, op, f"{count} calls", DEFAULT_SCHEDULE, 0, 0)
            for op, count in sorted(emitted.others.items())
        ]
    if "sample" in kernels.makers and record.model.generates:
        report.append(ReportRow("step_1", "sample", "logits", kernels.add("sample", record.model.vocab_size), 0, 0))
    return DispatchedModule(
        relax_module,
        builder.get(),
        packed_weights(record, target.kind),
        tuple(report),
        kernels.calls(report),
        kernels.sources(),
    )


def with_kernels(module: tvm.IRModule, kernels: Sequence[KernelSource], target: TargetSpec) -> tvm.IRModule:
    """A module with these kernels made again for a target of one CPU level; everything else stays as it is."""
    makers = kernels_of(target)
    result = tvm.IRModule(module.functions, attrs=module.attrs)
    for kernel in kernels:
        result.update_func(
            result.get_global_var(kernel.name), _named(makers[kernel.op](*kernel.arguments), kernel.name)
        )
    return result


def _named(function: Any, name: str) -> Any:  # noqa: ANN401 (a tirx.PrimFunc)
    return function.with_attr("global_symbol", name)


@dataclass(frozen=True)
class Boundary:
    """The inputs of a graph beside those of its compiled function, whose caches are rings of all slots."""

    name: str
    graph: dict[str, Expr]  # parameters of the graph that are not weights, by name
    function: dict[str, Expr]  # inputs of the function, by name and in order

    @classmethod
    def of(cls, function: relax.Function, graph: Graph, compiled: Function) -> "Boundary":
        """New variables for the function's inputs, except for ids and positions, which are the graph's own."""
        given = dict(zip(_names(graph.signature), function.params[: len(graph.signature.inputs)], strict=True))
        shared = {spec.name for spec in graph.signature.call}
        inputs = {
            spec.name: given[spec.name]
            if spec.name in shared
            else relax.Var(spec.name.replace(".", "_"), relax.TensorType(spec.shape, str(bits_dtype(spec.dtype))))
            for spec in compiled.signature.inputs
        }
        return cls(graph.name, given, inputs)

    @property
    def rings(self) -> dict[Expr, Expr]:
        """The ring of each cache of the graph."""
        return {value: self.function[name] for name, value in self.graph.items() if value is not self.function[name]}


def _names(signature: Signature) -> list[str]:
    return [spec.name for spec in signature.inputs]


def weights_of(
    record: GraphsRecord, function: relax.Function, graph: Graph, kind: TargetKind
) -> dict[Expr, GraphWeight]:
    """The model's tensors in order, by the parameter for each, with new variables for their packed tensors."""
    weights = {}
    for tensor, parameter in zip(record.tensors, function.params[len(graph.signature.inputs) :], strict=True):
        packed = [part.spec for part in packed_tensors(tensor, record.model.n_experts or 1, kind)]
        parts = tuple(
            relax.Var(spec.name.replace(".", "_"), relax.TensorType(spec.shape, spec.dtype)) for spec in packed
        )
        weights[parameter] = GraphWeight(tensor, parts, sum(tensor_bytes(spec) for spec in specs(tensor)))
    return weights


def find_regions(
    relax_module: RelaxModule, graph: Graph, weights: dict[Expr, GraphWeight], boundary: Boundary
) -> dict[Expr, Region]:
    """Every region of one graph, by the value that it computes; `weights` comes from `weights_of`.

    Raises `UserError` if a cache belongs to no rolling attention.
    """
    function = relax_module.module[graph.name]
    dataflow = Dataflow.of(function)
    caches = [boundary.graph[spec.name] for spec in graph.signature.caches]
    present = dict(zip(caches, _outputs(function)[1:], strict=True))
    context = Context(
        dataflow,
        relax_module.record.model,
        {value: name for name, value in boundary.graph.items()},
        weights,
        present,
        boundary.rings,
        boundary.function[SLOTS],
        boundary.function.get(COLUMN),
    )
    regions: dict[Expr, Region] = {}
    reasons: list[str] = []
    for value, call in dataflow.calls.items():
        for op, rule in RULES:
            if not is_call(call, op):
                continue
            try:
                regions[value] = rule(context, value)
                break
            except NoMatch as reason:
                if op == "reshape" and _reads_softmax(dataflow, value):
                    reasons.append(str(reason))
    _check_experts(context, regions, graph)
    _check_column(context, regions, graph)
    owned = {ring for region in regions.values() for ring in (region.inputs[i] for i in region.updates)}
    orphans = [context.input_name(cache) for cache in caches if context.rings[cache] not in owned]
    if orphans:
        why = reasons[0] if reasons else "no attention reads it"
        raise UserError(
            f"{graph.name}: {orphans[0]} is not used by a rolling attention with its exact window ({why}); "
            "a library built from this graph could be silently wrong; export the graphs again"
        )
    return regions


def _check_experts(context: Context, regions: dict[Expr, Region], graph: Graph) -> None:
    """Raise `UserError` if anything but a mixture kernel would compute experts.

    A default schedule would compute all of them for every token.
    """
    used = {part for region in regions.values() if region.op == "mixture" for part in region.inputs[2:]}
    left = [w.tensor.name for w in context.weights.values() if EXPERTS in w.tensor.name and w.parts[0] not in used]
    if left:
        raise UserError(
            f"{graph.name}: {left[0]} is not used by a mixture of experts in the form that `python -m export` writes; "
            "export the graphs again"
        )


def _check_column(context: Context, regions: dict[Expr, Region], graph: Graph) -> None:
    """Raise `UserError` if a prompt's outputs would be those of the last token of a call, which may be padding."""
    if context.column is not None and not any(context.column in region.inputs for region in regions.values()):
        raise UserError(
            f"{graph.name}: the head does not read the last token in the form that `python -m export` writes; "
            "export the graphs again"
        )


def _reads_softmax(dataflow: Dataflow, value: Expr) -> bool:
    """Whether a reshape is the end of an attention, so that its mismatch is worth reporting."""
    try:
        merged = dataflow.permuted(dataflow.args(value, "reshape")[0], (0, 2, 1, 3))
        return is_call(
            dataflow.calls.get(dataflow.args(dataflow.args(merged, "reshape")[0], "matmul")[0]), "nn.softmax"
        )
    except NoMatch:
        return False


def _outputs(function: relax.Function) -> list[Expr]:
    """The function's outputs: the variables of a tuple that may itself be bound to a variable."""
    body = function.body.body
    bound = {b.var: b.value for block in function.body.blocks for b in block.bindings}
    while not isinstance(body, relax.Tuple):
        body = bound[body]
    return list(body.fields)


@dataclass(frozen=True)
class _Kernel:
    name: str  # in the library
    function: Any  # a tirx.PrimFunc
    variable: Expr


class _MadeKernels:
    """Kernels of one target, made once for each distinct set of arguments."""

    def __init__(self, builder: relax.BlockBuilder, kernels: Kernels) -> None:
        self.builder = builder
        self.makers = kernels
        self.made: dict[tuple[str, tuple[Any, ...]], _Kernel] = {}
        self.counts: Counter[str] = Counter()

    def get(self, region: Region) -> Expr:
        """The global variable of the region's kernel."""
        self.add(region.op, *region.arguments)
        return self.made[region.op, region.arguments].variable

    def add(self, op: str, *arguments: Any) -> str:  # noqa: ANN401 (arguments of a kernel's maker)
        """Make a kernel unless one with these arguments exists; returns its name in the library."""
        if (op, arguments) not in self.made:
            name = f"{op}_{self.counts[op]}"
            self.counts[op] += 1
            function = _named(self.makers[op](*arguments), name)
            self.made[op, arguments] = _Kernel(name, function, self.builder.add_func(function, name))
        return self.made[op, arguments].name

    def name(self, region: Region) -> str:
        """The kernel's name in the library."""
        return self.made[region.op, region.arguments].name

    def sources(self) -> tuple[KernelSource, ...]:
        """What each kernel was made from."""
        return tuple(KernelSource(kernel.name, op, arguments) for (op, arguments), kernel in self.made.items())

    def calls(self, report: Sequence[ReportRow]) -> tuple[KernelCall, ...]:
        """Describe what each kernel computes, and how often the reported graphs call it."""
        by_kernel: dict[str, list[ReportRow]] = {}
        for row in report:
            by_kernel.setdefault(row.kernel, []).append(row)
        return tuple(
            _kernel_use(op, arguments, kernel, by_kernel[kernel.name]) for (op, arguments), kernel in self.made.items()
        )


def _spec(buffer: Any) -> TensorSpec:  # noqa: ANN401 (a TIR buffer)
    dtype = str(buffer.dtype)
    return TensorSpec(name=str(buffer.name), shape=tuple(map(int, buffer.shape)), dtype=dtype)  # type: ignore[arg-type]


def _kernel_use(op: str, arguments: tuple[Any, ...], kernel: _Kernel, rows: Sequence[ReportRow]) -> KernelCall:
    return KernelCall(
        kernel=kernel.name,
        op=op,
        arguments=tuple(msgspec.to_builtins(argument) for argument in arguments),
        parameters=tuple(_spec(buffer) for buffer in kernel.function.params),
        calls=dict(Counter(row.graph for row in rows)),
        bytes=rows[0].bytes,
        flops=rows[0].flops,
    )


@dataclass(frozen=True)
class _Emitted:
    regions: list[Region]
    others: Counter[str]  # Relax operations left to default schedules


def _rewrite(
    builder: relax.BlockBuilder,
    kernels: _MadeKernels,
    function: relax.Function,
    regions: dict[Expr, Region],
    weights: dict[Expr, GraphWeight],
    boundary: Boundary,
) -> _Emitted:
    """Emit the function again: live regions as kernel calls, other live calls unchanged, logits as the only output.

    Vectors are stored in the artifact as the graph reads them, so any operation may read them, such as the one that
    adds a head's bias; only kernels read matrices.
    """
    inputs = list(boundary.function.values())
    packed = [part for w in weights.values() for part in w.parts]
    vectors = {parameter: w.parts[0] for parameter, w in weights.items() if len(w.tensor.shape) == 1}
    new: dict[Expr, Expr] = {p: p for p in (*inputs, *packed)} | vectors
    calls = Dataflow.of(function).calls
    logits = _outputs(function)[0]
    emitted: list[Region] = []
    others: Counter[str] = Counter()
    with builder.function(boundary.name, [*inputs, *packed]):
        with builder.dataflow():
            for value in _live(calls, regions, logits):
                if value in regions:
                    emitted.append(regions[value])
                    new[value] = builder.emit(_kernel_call(kernels, regions[value], new))
                else:
                    others[calls[value].op.name.removeprefix("relax.")] += 1
                    new[value] = builder.emit(_substitute(calls[value], new))
            output = builder.emit_output(new[logits])
        builder.emit_func_output(output)
    return _Emitted(emitted, others)


def _live(calls: dict[Expr, Expr], regions: dict[Expr, Region], output: Expr) -> list[Expr]:
    """Values that the output needs, in the function's order, without those inside a region."""
    needed = {output}
    live = []
    for value in reversed(list(calls)):
        if value in needed:
            live.append(value)
            needed.update(regions[value].inputs if value in regions else variables(calls[value]))
    return live[::-1]


def _substitute(expression: Expr, new: dict[Expr, Expr]) -> Expr:
    """Rewrite an expression over new variables."""
    if isinstance(expression, relax.Var):
        if expression not in new:
            raise UserError(
                f"the graph reads the weight {expression.name} in a form that no kernel supports; "
                "export the graphs again"
            )
        return new[expression]
    if isinstance(expression, relax.Tuple):
        return relax.Tuple([_substitute(field, new) for field in expression.fields])
    if isinstance(expression, relax.Call):
        return relax.Call(
            expression.op, [_substitute(arg, new) for arg in expression.args], expression.attrs, expression.ty_args
        )
    return expression


def _kernel_call(kernels: _MadeKernels, region: Region, new: dict[Expr, Expr]) -> Expr:
    output = relax.TensorType(shape(region.output), dtype(region.output))
    arguments = [new.get(value, value) for value in region.inputs]  # constants have no new variable
    if region.scratch:
        types = [output, *(relax.TensorType(size, kind) for size, kind in region.scratch)]
        return relax.TupleGetItem(relax.call_tir(kernels.get(region), arguments, out_ty=types), 0)
    if not region.updates:
        return relax.call_tir(kernels.get(region), arguments, out_ty=output)
    types = [output, *(relax.TensorType(shape(region.inputs[i]), dtype(region.inputs[i])) for i in region.updates)]
    call = relax.op.call_tir_inplace(kernels.get(region), arguments, [IN_PLACE_NEW, *region.updates], types)
    return relax.TupleGetItem(call, 0)
