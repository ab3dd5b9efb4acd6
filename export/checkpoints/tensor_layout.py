"""Our tensors: their names and shapes, and the source tensors whose rows make them up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from export.checkpoints.families import Family
from runtime.artifact.manifest import ModelConfig

EMBEDDINGS = "tok_embeddings.weight"
HEAD_WEIGHT = "output.weight"  # absent from a model with tied embeddings
EXPERTS = ".experts."  # in our names of the tensors that hold every expert's rows
EXPERT = "{e}"  # stands for the expert's number in the names of source tensors

# The rows, as one size for each source tensor to concatenate, and the columns (None for a vector); see `sizes`.
Layout = Mapping[str, tuple[tuple[str, ...], str | None]]
OUTSIDE: Layout = {
    EMBEDDINGS: (("vocab",), "dim"),
    "norm.weight": (("dim",), None),
    HEAD_WEIGHT: (("outputs",), "dim"),
    "output.bias": (("outputs",), None),
}
ATTENTION: Layout = {
    "layers.{i}.attention_norm.weight": (("dim",), None),
    "layers.{i}.attention.wqkv.weight": (("q", "kv", "kv"), "dim"),
    "layers.{i}.attention.wo.weight": (("dim",), "q"),
    "layers.{i}.ffn_norm.weight": (("dim",), None),
}
LAYERS: Mapping[str, Layout] = {  # by the feed-forward's kind
    "dense": {
        **ATTENTION,
        "layers.{i}.feed_forward.w13.weight": (("hidden", "hidden"), "dim"),
        "layers.{i}.feed_forward.w2.weight": (("dim",), "hidden"),
    },
    # The experts' matrices are stacked by rows, so that one row-wise store and one kernel argument hold them all.
    "mixture": {
        **ATTENTION,
        "layers.{i}.feed_forward.gate.weight": (("experts",), "dim"),
        "layers.{i}.feed_forward.experts.w13.weight": (("hidden", "hidden"), "dim"),
        "layers.{i}.feed_forward.experts.w2.weight": (("dim",), "hidden"),
    },
}


@dataclass(frozen=True)
class Part:
    """Some or all rows of one source tensor, which counts as a matrix: every axis but the last counts rows.

    `shape` is the part's own: (rows, columns), or (rows,) of a vector.
    """

    source: str
    source_shape: tuple[int, ...]
    first_row: int
    shape: tuple[int, ...]
    interleaved_heads: int | None  # the number of heads if rotary pairs are neighbouring rows


@dataclass(frozen=True)
class AssembledTensor:
    """One of our tensors: its shape, and the source tensors whose rows make it up."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def weights(family: Family, config: ModelConfig) -> dict[str, AssembledTensor]:
    """Our tensors by name, those outside the layers first, with the parts of each."""
    outside = [
        name for name in OUTSIDE if name in family.sources and not (name == HEAD_WEIGHT and config.tied_embeddings)
    ]
    result = {name: _weight(family, config, name, OUTSIDE[name], 0) for name in outside}
    for i in range(config.n_layers):
        result |= {
            name.format(i=i): _weight(family, config, name, entry, i) for name, entry in LAYERS[family.layers].items()
        }
    return result


def ignored(family: Family, config: ModelConfig) -> set[str]:
    """Names of the source tensors that may be present but carry no information."""
    return {name.format(i=i) for name in family.ignored for i in range(config.n_layers)}


def sizes(config: ModelConfig) -> dict[str, int]:
    """The sizes that layouts refer to, by name."""
    return {
        "vocab": config.vocab_size,
        "outputs": config.n_outputs,
        "dim": config.dim,
        "hidden": config.hidden_dim,
        "q": config.n_heads * config.head_dim,
        "kv": config.n_kv_heads * config.head_dim,
        "experts": config.n_experts or 0,
    }


def _weight(
    family: Family, config: ModelConfig, name: str, entry: tuple[tuple[str, ...], str | None], layer: int
) -> AssembledTensor:
    n = sizes(config)
    rows, columns = entry
    tail = () if columns is None else (n[columns],)
    heads = {source: getattr(config, field) for source, field in (family.interleaved or {}).items()}
    experts = (config.n_experts or 0) if EXPERTS in name else 1
    pieces = [(source, n[size]) for source, size in zip(family.sources[name], rows, strict=True)]
    parts = []
    for e in range(experts):
        for k, (source, count) in enumerate(pieces):
            height = _rows_of(source, pieces)  # of one expert
            stacked = EXPERTS in name and EXPERT not in source
            whole = (experts, height, *tail) if stacked else (height, *tail)
            first = _rows_of(source, pieces[:k]) + (e * height if stacked else 0)
            parts.append(Part(source.format(i=layer, e=e), whole, first, (count, *tail), heads.get(source)))
    return AssembledTensor((sum(part.shape[0] for part in parts), *tail), tuple(parts))


def _rows_of(source: str, pieces: Sequence[tuple[str, int]]) -> int:
    return sum(rows for name, rows in pieces if name == source)
