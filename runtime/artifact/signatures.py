"""The signature of each graph, as model and shape imply it, and the sizes that kernels can index.

The export defines it before a trace, and every artifact is checked against it.
"""

from collections.abc import Iterator
from math import prod

from runtime.artifact.caches import cache_format
from runtime.artifact.manifest import HEADS, DType, Graph, ModelConfig, Shape, Signature, TensorSpec

CACHE_LIMIT = 2**40  # elements of one cache
ACTIVATION_LIMIT = 2**31 - 1  # numbers that one call computes between two kernels, which count them in 32 bits


def graphs_of(model: ModelConfig, shape: Shape, cache_dtype: DType) -> tuple[Graph, ...]:
    """The prefill graphs, largest chunk first, and decode if the model generates text, each with its signature.

    `cache_dtype` is the dtype of the numbers in the caches, which tells their format (`runtime.artifact.caches`).
    """
    calls = [(f"prefill_{tokens}", tokens) for tokens in shape.prefill_chunks]
    calls += [("decode", 1)] if model.generates else []
    return tuple(
        Graph(name=name, tokens=tokens, signature=signature_of(model, shape, tokens, cache_dtype))
        for name, tokens in calls
    )


def signature_of(model: ModelConfig, shape: Shape, tokens: int, cache_dtype: DType) -> Signature:
    """Inputs and outputs of a graph that takes T = `tokens` tokens of each sequence at once.

    Inputs: input_ids and position_ids (B, T) int64, then the caches of each layer (B, n_kv_heads, slots, head_dim).
    Outputs: the head's, (B, T, n_outputs) or (B, 1, n_outputs) float32, then the caches again.
    """
    ids = [TensorSpec(name=name, shape=(shape.batch, tokens), dtype="int64") for name in ("input_ids", "position_ids")]
    head = HEADS[model.head]
    given = tokens if head.every_token else 1
    output = TensorSpec(name=head.output, shape=(shape.batch, given, model.n_outputs), dtype="float32")
    return Signature(
        inputs=(*ids, *_caches(model, shape, cache_dtype, "past_key_values")),
        outputs=(output, *_caches(model, shape, cache_dtype, "present")),
    )


def _caches(model: ModelConfig, shape: Shape, dtype: DType, prefix: str) -> list[TensorSpec]:
    """Key and value of each layer, then by turns what else their format needs, such as scales."""
    return [
        TensorSpec(
            name=f"{prefix}.{i}.{side}{part.suffix}",
            shape=(shape.batch, model.n_kv_heads, length, part.width),
            dtype=part.dtype,
        )
        for i, length in enumerate(model.cache_lens(shape.cache_len))
        for part in cache_format(dtype).parts(model.head_dim)
        for side in ("key", "value")
    ]


def size_problems(model: ModelConfig, shape: Shape, graph: Graph) -> Iterator[str]:
    """What is larger than kernels can index, as clauses; it follows from the model and the sizes of a compile."""
    output, *caches = graph.signature.outputs
    for spec, limit in ((output, ACTIVATION_LIMIT), *((cache, CACHE_LIMIT) for cache in caches)):
        if prod(spec.shape) > limit:
            found = f"{spec.name} {list(spec.shape)} {spec.dtype}"
            yield f"graph {graph.name} has {found}, expected at most {limit} elements"
    tokens, width = shape.batch * graph.tokens, _widest(model)
    if tokens * width > ACTIVATION_LIMIT:
        yield (
            f"graph {graph.name} computes {width} numbers for each of {tokens} tokens at once, "
            f"expected at most {ACTIVATION_LIMIT} numbers in all"
        )


def _widest(model: ModelConfig) -> int:
    """The most numbers that a kernel hands on for a token, before the head."""
    projections = (model.n_heads + 2 * model.n_kv_heads) * model.head_dim
    gate_and_up = 2 * model.hidden_dim * (model.experts_per_token or 1)
    chosen = model.dim * (model.experts_per_token or 1)
    return max(projections, gate_and_up, chosen, model.n_experts or 0)
