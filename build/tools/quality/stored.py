"""What a checkpoint stores, and how far a scheme's stored matrices are from it."""

from collections import Counter

import numpy as np

from export.checkpoints.checkpoint import Checkpoint
from export.checkpoints.source import SourceTensor
from export.weights.stored import StoredWeights
from export.weights.table import format_of, load, specs

MOST_NAMED = 3  # packings; a file may mix more


def packings(checkpoint: Checkpoint) -> list[str]:
    """How a checkpoint stores its matrices, by the names that its users know; those with the most bytes come first."""
    sizes: Counter[str] = Counter()
    for tensor in _matrices(checkpoint):
        sizes[tensor.packing or tensor.dtype] += tensor.nbytes
    return sorted(sizes, key=lambda name: (-sizes[name], name))


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether any matrix is stored in other than plain numbers."""
    return any(tensor.packing is not None for tensor in _matrices(checkpoint))


def _matrices(checkpoint: Checkpoint) -> list[SourceTensor]:
    """The matrices that the model is made of, each once, as the checkpoint stores them."""
    names = {part.source for weight in checkpoint.weights.values() for part in weight.parts}
    tensors = [checkpoint.source.tensors[name] for name in names]
    return [tensor for tensor in tensors if len(tensor.shape) > 1]


def described(baseline: str, names: list[str]) -> str:
    """A name for float32 weights that were read from these packings, such as "fp32 of Q4_1, Q8_0"."""
    if names == ["float32"]:
        return baseline
    listed = ", ".join([*names[:MOST_NAMED], *(["..."] if len(names) > MOST_NAMED else [])])
    return f"{baseline} of {listed}"


def layer_errors(checkpoint: Checkpoint, weights: StoredWeights) -> dict[str, list[float]]:
    """Error of each layer's stored matrices by kind: |stored - checkpoint| / |checkpoint|, in Frobenius norms."""
    source = weights.tensors()
    errors: dict[str, list[float]] = {}
    for tensor in weights.record.tensors:
        if format_of(tensor.stored).scaled:
            exact = checkpoint.tensor(tensor.name).astype(np.float32)
            stored = load(tensor, {spec.name: source.read(spec.name) for spec in specs(tensor)})
            kind = tensor.name.removesuffix(".weight").split(".")[-1]
            errors.setdefault(kind, []).append(float(np.linalg.norm(stored - exact) / np.linalg.norm(exact)))
    return errors
