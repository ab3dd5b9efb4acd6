"""Our tensors: which there are, their shapes, and the source tensors whose rows make them up."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from export.checkpoints.families import Family
from runtime.artifact.manifest import ModelConfig

HEAD_WEIGHT = "output.weight"  # left out of a model with tied embeddings
EXPERT = "{e}"  # stands for the expert's number in the names of source tensors

# Rows, one size for each source tensor that they are concatenated from, and columns (None for a vector); see `sizes`.
Layout = Mapping[str, tuple[tuple[str, ...], str | None]]
OUTSIDE: Layout = {
    "tok_embeddings.weight": (("vocab",), "dim"),
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
    "mixture": {  # an expert's matrix is stacked on the one before it, so that one row-wise store and one kernel argument hold them all
        **ATTENTION,
        "layers.{i}.feed_forward.gate.weight": (("experts",), "dim"),
        "layers.{i}.feed_forward.experts.w13.weight": (("hidden", "hidden"), "dim"),
        "layers.{i}.feed_forward.experts.w2.weight": (("dim",), "hidden"),
    },
}


@dataclass(frozen=True)
class Part:
    """One source tensor: its shape, and the number of heads if its rows pair rotary neighbours."""

    source: str
    shape: tuple[int, ...]
    interleaved_heads: int | None


@dataclass(frozen=True)
class AssembledTensor:
    """One of our tensors: its shape, and the source tensors whose rows make it up."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def weights(family: Family, config: ModelConfig) -> dict[str, AssembledTensor]:
    """Our tensors by name, those outside the layers first, and what each is made of."""
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
    """Names of the source tensors that may be there and carry nothing."""
    return {name.format(i=i) for name in family.ignored for i in range(config.n_layers)}


def sizes(config: ModelConfig) -> dict[str, int]:
    """The sizes that layouts speak of."""
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
    parts = tuple(
        Part(source.format(i=layer, e=e), (n[size], *tail), heads.get(source))
        for e in _experts(family.sources[name], config)
        for source, size in zip(family.sources[name], rows, strict=True)
    )
    return AssembledTensor((sum(part.shape[0] for part in parts), *tail), parts)


def _experts(sources: tuple[str, ...], config: ModelConfig) -> Iterator[int]:
    """The experts that `sources` are repeated for; a single pass for what all tokens share."""
    yield from range((config.n_experts or 0) if EXPERT in sources[0] else 1)
