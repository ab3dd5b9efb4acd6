"""How a graph turns the stored tensors of a weight into the float32 weight, as ONNX operators.

The exporter writes these nodes, and the importer accepts exactly them; neither knows the formats.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stored:
    """A stored tensor as an input. Dtypes are names of ONNX data types."""

    suffix: str = ""  # added to the tensor's own name
    number: str | None = None  # the dtype declared for its bytes, with the model's shape, if not the stored dtype


@dataclass(frozen=True)
class Sizes:
    """A constant of int64, such as a shape, as an input."""

    values: tuple[int, ...]

    @property
    def name(self) -> str:
        """The constant's name in a graph, in which equal ones are one."""
        return f"sizes.{'x'.join(map(str, self.values))}"


@dataclass(frozen=True)
class Step:
    """One operator; its inputs are stored tensors, constants, and the results of earlier steps by their labels."""

    label: str
    operator: str
    inputs: tuple[Stored | Sizes | str, ...]
    attributes: Mapping[str, int | str] = field(default_factory=dict)  # `to` is the name of a data type

    def result(self, tensor: str) -> str:
        """The name of the result in a graph."""
        return f"{tensor}.{self.label}"

    def input_names(self, tensor: str) -> tuple[str, ...]:
        """The names of the inputs in a graph."""
        return tuple(_name(given, tensor) for given in self.inputs)


def _name(given: Stored | Sizes | str, tensor: str) -> str:
    if isinstance(given, Stored):
        return tensor + given.suffix
    return given.name if isinstance(given, Sizes) else f"{tensor}.{given}"


RESULT = "float32"  # label of the last step


@dataclass(frozen=True)
class Widening:
    """The steps in order; the last gives the float32 weight."""

    steps: tuple[Step, ...]

    @property
    def opset(self) -> int:
        """The first version of ONNX's operators that has them all, as far as they are newer than the trace's."""
        return OPSET_OF_BLOCKS if any("block_size" in step.attributes for step in self.steps) else 0


OPSET_OF_BLOCKS = 21  # in which DequantizeLinear supports groups


def cast(label: str, given: Stored | str, dtype: str) -> Step:
    """A step that changes the dtype."""
    return Step(label, "Cast", (given,), {"to": dtype})


def spread_steps(label: str, given: Stored | str, n: int, groups: int, size: int, columns: int) -> tuple[Step, ...]:
    """Steps from one number for each group (n, groups) to one for each column (n, columns), labelled `label`.

    The last group may be shorter than `size`.
    """
    whole = groups * size == columns
    last = label if whole else f"{label}.padded"
    steps = (
        Step(f"{label}.column", "Reshape", (given, Sizes((n, groups, 1)))),
        Step(f"{label}.repeated", "Expand", (f"{label}.column", Sizes((n, groups, size)))),
        Step(last, "Reshape", (f"{label}.repeated", Sizes((n, groups * size)))),
    )
    if whole:
        return steps
    return (*steps, Step(label, "Slice", (last, Sizes((0,)), Sizes((columns,)), Sizes((1,)))))
