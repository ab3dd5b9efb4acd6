"""What every rule reads and answers: the function that it looks at, and the region that it has found."""

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
    bytes: int  # least memory traffic of one call: weights and caches read, without activations
    flops: int
    updates: tuple[int, ...] = ()  # positions of inputs that are updated in place
    scratch: tuple[
        tuple[tuple[int, ...], str], ...
    ] = ()  # shape and dtype of what the kernel keeps between its steps; written after the output


@dataclass(frozen=True)
class GraphWeight:
    """A tensor of the model: what the graph takes as a float32 parameter, and the packed tensors that hold it."""

    tensor: ModelTensor
    parts: tuple[Expr, ...]  # variables of the packed tensors, in the kernels' order
    nbytes: int  # of all of them

    @property
    def n(self) -> int:
        """Outputs."""
        return self.tensor.shape[0]

    @property
    def k(self) -> int:
        """Inputs."""
        return self.tensor.shape[1]


@dataclass(frozen=True)
class Context:
    """What rules need to know about the function that they read."""

    dataflow: Dataflow
    model: ModelConfig
    inputs: dict[Expr, str]  # parameters that are no weights, to their names
    weights: dict[Expr, GraphWeight]  # parameters that are
    present: dict[Expr, Expr]  # cache parameter to the graph's output that replaces it

    def input_name(self, value: Expr) -> str:
        """Name of an input, or NoMatch."""
        if value not in self.inputs:
            raise NoMatch("expected an input, found a computed value")
        return self.inputs[value]

    def weight(self, value: Expr) -> GraphWeight:
        """The weight that a parameter stands for, or NoMatch."""
        if value not in self.weights:
            raise NoMatch("expected a weight, found a computed value")
        return self.weights[value]


Rule = Callable[[Context, Expr], Region]
