"""The signature of each graph and of each compiled function, as model and shape imply it, and what kernels can index.

The export defines it before a trace, and every artifact is checked against it.
"""

from collections.abc import Iterator
from math import prod

from runtime.artifact.caches import cache_format
from runtime.artifact.manifest import (
    COLUMN,
    HEADS,
    IDS,
    POSITIONS,
    SLOTS,
    DType,
    Function,
    Graph,
    ModelConfig,
    Shape,
    Signature,
    TensorSpec,
)

CACHE_LIMIT = 2**40  # elements of one cache
ACTIVATION_LIMIT = 2**31 - 1  # numbers that one call computes between two kernels, which count them in 32 bits


def graphs_of(model: ModelConfig, shape: Shape, cache_dtype: DType) -> tuple[Graph, ...]:
    """The ONNX graphs: prefill, largest chunk first, then steps, fewest rows first, if the model generates text.

    `cache_dtype` is the dtype of the numbers in the caches, which tells their format (`runtime.artifact.caches`).
    Inputs: input_ids and position_ids (B, T) int64, then the caches of each layer (B, n_kv_heads, W, width).
    Outputs: the head's, (B, T, n_outputs) or (B, 1, n_outputs) float32, then the caches again.
    """
    lengths = model.cache_lens(shape.cache_len)

    def signature(rows: int, tokens: int) -> Signature:
        caches = (
            tuple(_caches(model, rows, lengths, cache_dtype, prefix)) for prefix in ("past_key_values", "present")
        )
        past, present = caches
        return Signature(
            inputs=(*_ids(rows, tokens), *past),
            outputs=(_output(model, rows, tokens), *present),
        )

    return tuple(
        Graph(name=name, rows=rows, tokens=tokens, signature=signature(rows, tokens))
        for name, rows, tokens in _calls(model, shape)
    )


def functions_of(model: ModelConfig, shape: Shape, cache_dtype: DType) -> tuple[Function, ...]:
    """The compiled functions, one for each of `graphs_of`, with the same names in the same order.

    Inputs: input_ids and position_ids (B, T) int64, where a position of -1 hides its token; slots (B,) int64, which row
    belongs to which; of a prefill that returns one token's outputs, column (1,) int64, the index of that token; and the
    rings of each layer (slots, n_kv_heads, columns, width), which are updated in place. Outputs: the head's.
    """
    lengths = model.ring_lens(shape.cache_len, shape.longest_call)
    rings = tuple(_caches(model, shape.slots, lengths, cache_dtype, "past_key_values"))

    def signature(rows: int, tokens: int) -> Signature:
        slots = TensorSpec(name=SLOTS, shape=(rows,), dtype="int64")
        column = [TensorSpec(name=COLUMN, shape=(1,), dtype="int64")] if picks_column(model, tokens) else []
        return Signature(inputs=(*_ids(rows, tokens), slots, *column, *rings), outputs=(_output(model, rows, tokens),))

    return tuple(
        Function(name=name, rows=rows, tokens=tokens, signature=signature(rows, tokens))
        for name, rows, tokens in _calls(model, shape)
    )


def picks_column(model: ModelConfig, tokens: int) -> bool:
    """Whether a function that takes so many tokens of a sequence returns the outputs of one of them."""
    return tokens > 1 and not HEADS[model.head].every_token


def _calls(model: ModelConfig, shape: Shape) -> Iterator[tuple[str, int, int]]:
    """Name, rows and tokens of every graph."""
    yield from ((f"prefill_{tokens}", 1, tokens) for tokens in shape.prefill_chunks)
    if model.generates:
        yield from ((f"step_{rows}", rows, 1) for rows in shape.step_rows)


def _ids(rows: int, tokens: int) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name=name, shape=(rows, tokens), dtype="int64") for name in (IDS, POSITIONS))


def _output(model: ModelConfig, rows: int, tokens: int) -> TensorSpec:
    head = HEADS[model.head]
    return TensorSpec(
        name=head.output, shape=(rows, tokens if head.every_token else 1, model.n_outputs), dtype="float32"
    )


def _caches(
    model: ModelConfig, sequences: int, lengths: tuple[int, ...], dtype: DType, prefix: str
) -> Iterator[TensorSpec]:
    """Key and value of each layer, then by turns what else their format needs, such as scales."""
    for i, length in enumerate(lengths):
        for part in cache_format(dtype).parts(model.head_dim):
            for side in ("key", "value"):
                yield TensorSpec(
                    name=f"{prefix}.{i}.{side}{part.suffix}",
                    shape=(sequences, model.n_kv_heads, length, part.width),
                    dtype=part.dtype,
                )


def size_problems(model: ModelConfig, function: Function) -> Iterator[str]:
    """What is larger than kernels can index, as clauses; it follows from the model and the sizes of a compile."""
    (output,), caches = function.signature.outputs, function.signature.caches
    for spec, limit in ((output, ACTIVATION_LIMIT), *((cache, CACHE_LIMIT) for cache in caches)):
        if prod(spec.shape) > limit:
            found = f"{spec.name} {list(spec.shape)} {spec.dtype}"
            yield f"function {function.name} has {found}, expected at most {limit} elements"
    tokens, width = function.rows * function.tokens, _widest(model)
    if tokens * width > ACTIVATION_LIMIT:
        yield (
            f"function {function.name} computes {width} numbers for each of {tokens} tokens at once, "
            f"expected at most {ACTIVATION_LIMIT} numbers in all"
        )


def _widest(model: ModelConfig) -> int:
    """The most numbers that a kernel hands on for a token, before the head."""
    projections = (model.n_heads + 2 * model.n_kv_heads) * model.head_dim
    gate_and_up = 2 * model.hidden_dim * (model.experts_per_token or 1)
    chosen = model.dim * (model.experts_per_token or 1)
    return max(projections, gate_and_up, chosen, model.n_experts or 0)
