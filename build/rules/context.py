"""The input and the answer of every rule: the function that it reads, and the region that it finds."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from build.rules.dataflow import Dataflow, Expr, NoMatch
from export.weights.format import ModelTensor
from runtime.artifact.manifest import ModelConfig


@dataclass(frozen=True)
class Region:
    """One kernel call: what it computes, from which values, and what it costs."""

    op: str  # a row of the kernel table
    arguments: tuple[Any, ...]  # of the kernel's maker
    inputs: tuple[Expr, ...]  # tensors, in the kernel's order
    output: Expr  # the value that the region computes
    label: str  # the weight or cache that tells this call from others of the same op
    bytes: int  # minimum memory traffic of one call: weights and caches read, without activations
    flops: int
    updates: tuple[int, ...] = ()  # indices of inputs that are updated in place
    # Shapes and dtypes of what the kernel keeps between its steps; these results follow the output.
    scratch: tuple[tuple[tuple[int, ...], str], ...] = ()


@dataclass(frozen=True)
class GraphWeight:
    """A tensor of the model: the graph takes it as a float32 parameter, and packed tensors hold it."""

    tensor: ModelTensor
    parts: tuple[Expr, ...]  # variables of the packed tensors, in the kernels' order
    nbytes: int  # of all of them

    @property
    def n(self) -> int:
        """Number of outputs."""
        return self.tensor.shape[0]

    @property
    def k(self) -> int:
        """Number of inputs."""
        return self.tensor.shape[1]


@dataclass(frozen=True)
class Context:
    """Everything that rules need to know about the function that they read."""

    dataflow: Dataflow
    model: ModelConfig
    inputs: dict[Expr, str]  # names of the parameters that are not weights
    weights: dict[Expr, GraphWeight]  # the parameters that are
    present: dict[Expr, Expr]  # for each cache parameter, the graph's output that replaces it
    rings: dict[Expr, Expr]  # for each cache parameter, the ring that holds the columns of all slots
    slots: Expr  # the function's input that says which slot each row belongs to
    column: Expr | None  # the input that says which token's outputs are wanted; None if all are, or a row has one

    def input_name(self, value: Expr) -> str:
        """Name of an input; raises `NoMatch` for any other value."""
        if value not in self.inputs:
            raise NoMatch("expected an input, found a computed value")
        return self.inputs[value]

    def weight(self, value: Expr) -> GraphWeight:
        """The weight that a parameter stands for; raises `NoMatch` for any other value."""
        if value not in self.weights:
            raise NoMatch("expected a weight, found a computed value")
        return self.weights[value]


Rule = Callable[[Context, Expr], Region]
