"""The families table: how each format's keys and tensors become our `ModelConfig` and our fused tensors. Data first, then what applies it.

To add a family, add a row. Hugging Face's and GGUF's names appear only here.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from runtime.errors import UserError
from runtime.manifest import ModelConfig

LAYER_LIMIT = 4096  # refuses absurd counts before anything is made for each layer
OVERRIDABLE = ("context_length", "norm_eps", "rope_theta", "sliding_window")  # the fields that leave every weight's shape alone
REQUIRED = ("dim", "hidden_dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "rope_theta", "tied_embeddings")

# Our tensors: rows, one size for each source tensor that they are concatenated from, and columns (None for a vector); see `sizes`.
LAYOUT: Mapping[str, tuple[tuple[str, ...], str | None]] = {
    "tok_embeddings.weight": (("vocab",), "dim"),
    "layers.{i}.attention_norm.weight": (("dim",), None),
    "layers.{i}.attention.wqkv.weight": (("q", "kv", "kv"), "dim"),
    "layers.{i}.attention.wo.weight": (("dim",), "q"),
    "layers.{i}.ffn_norm.weight": (("dim",), None),
    "layers.{i}.feed_forward.w13.weight": (("hidden", "hidden"), "dim"),
    "layers.{i}.feed_forward.w2.weight": (("dim",), "hidden"),
    "norm.weight": (("dim",), None),
    "output.weight": (("vocab",), "dim"),
}
HEAD = "output.weight"  # left out of a model with tied embeddings

HUGGINGFACE_KEYS = {
    "dim": "hidden_size",
    "hidden_dim": "intermediate_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tied_embeddings": "tie_word_embeddings",
    "context_length": "max_position_embeddings",
}
HUGGINGFACE_SOURCES = {
    "tok_embeddings.weight": ("model.embed_tokens.weight",),
    "layers.{i}.attention_norm.weight": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.attention.wqkv.weight": tuple(f"model.layers.{{i}}.self_attn.{x}_proj.weight" for x in "qkv"),
    "layers.{i}.attention.wo.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
    "layers.{i}.ffn_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.feed_forward.w13.weight": ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
    "layers.{i}.feed_forward.w2.weight": ("model.layers.{i}.mlp.down_proj.weight",),
    "norm.weight": ("model.norm.weight",),
    "output.weight": ("lm_head.weight",),
}
HUGGINGFACE_SUPPORTED = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "rope_type": ("default",),
    "partial_rotary_factor": (1.0, None),
    "layer_types": (None,),
    "quantization_config": (None,),
}
HUGGINGFACE_IGNORED = ("model.layers.{i}.self_attn.rotary_emb.inv_freq",)  # written by old releases; follows from rope_theta

GGUF_KEYS = {
    "dim": "embedding_length",
    "hidden_dim": "feed_forward_length",
    "n_layers": "block_count",
    "n_heads": "attention.head_count",
    "n_kv_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "vocab_size": "vocab_size",
    "norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "sliding_window": "attention.sliding_window",
    "tied_embeddings": "tied_embeddings",  # no such key: a head that is not stored is tied
    "context_length": "context_length",
}
GGUF_SOURCES = {
    "tok_embeddings.weight": ("token_embd.weight",),
    "layers.{i}.attention_norm.weight": ("blk.{i}.attn_norm.weight",),
    "layers.{i}.attention.wqkv.weight": ("blk.{i}.attn_q.weight", "blk.{i}.attn_k.weight", "blk.{i}.attn_v.weight"),
    "layers.{i}.attention.wo.weight": ("blk.{i}.attn_output.weight",),
    "layers.{i}.ffn_norm.weight": ("blk.{i}.ffn_norm.weight",),
    "layers.{i}.feed_forward.w13.weight": ("blk.{i}.ffn_gate.weight", "blk.{i}.ffn_up.weight"),
    "layers.{i}.feed_forward.w2.weight": ("blk.{i}.ffn_down.weight",),
    "norm.weight": ("output_norm.weight",),
    "output.weight": ("output.weight",),
}
GGUF_SUPPORTED = {"rope.scaling.type": ("none", None), "expert_count": (0, None)}


@dataclass(frozen=True)
class Family:
    """How one family is stored in one format."""

    family: str  # names the mathematics: which block of `export/model.py`
    keys: Mapping[str, str]  # our field -> the format's key
    defaults: Mapping[str, object]  # what the format's own software assumes of a key that is left out
    supported: Mapping[str, tuple[object, ...]]  # key -> the values that our block implements; None: absent or null
    sources: Mapping[str, tuple[str, ...]]  # our tensor -> the tensors whose rows make it up, in order
    ignored: tuple[str, ...] = ()  # tensors that carry nothing
    interleaved: Mapping[str, str] | None = None  # tensors whose rotary pairs are rows 2d, 2d + 1 -> the field that counts their heads


# Defaults are those of MistralConfig and LlamaConfig in transformers 5.23: a window that config.json leaves out is 4096, null is none.
FAMILIES: Mapping[str, Mapping[str, Family]] = {
    "huggingface": {
        "mistral": Family(
            family="mistral",
            keys=HUGGINGFACE_KEYS | {"sliding_window": "sliding_window"},
            defaults={
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-6,
                "rope_theta": 10000.0,
                "tie_word_embeddings": False,
                "max_position_embeddings": 131072,
                "sliding_window": 4096,
            },
            supported=HUGGINGFACE_SUPPORTED,
            sources=HUGGINGFACE_SOURCES,
            ignored=HUGGINGFACE_IGNORED,
        ),
        "llama": Family(  # a Mistral without a window
            family="mistral",
            keys=HUGGINGFACE_KEYS,
            defaults={"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False, "max_position_embeddings": 2048},
            supported=HUGGINGFACE_SUPPORTED,
            sources=HUGGINGFACE_SOURCES,
            ignored=HUGGINGFACE_IGNORED,
        ),
    },
    "gguf": {
        "llama": Family(  # what llama.cpp calls Llama and Mistral alike
            family="mistral",
            keys=GGUF_KEYS,
            defaults={"rope.freq_base": 10000.0, "tied_embeddings": True},
            supported=GGUF_SUPPORTED,
            sources=GGUF_SOURCES,
            interleaved={"blk.{i}.attn_q.weight": "n_heads", "blk.{i}.attn_k.weight": "n_kv_heads"},
        ),
    },
}


@dataclass(frozen=True)
class Part:
    """One source tensor: its shape, and the number of heads if its rows pair rotary neighbours."""

    source: str
    shape: tuple[int, ...]
    interleaved_heads: int | None


@dataclass(frozen=True)
class Weight:
    """One of our tensors: its shape, and the source tensors whose rows make it up."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def find(kind: str, key: object, where: str) -> Family:
    """The row of a format and the family that the checkpoint names; `UserError` lists those that exist."""
    rows = FAMILIES[kind]
    if not isinstance(key, str) or key not in rows:
        raise UserError(f"{where} names the architecture {key!r}, expected one of {', '.join(rows)}")
    return rows[key]


def model_config(family: Family, values: Mapping[str, object], overrides: Mapping[str, object], where: str) -> ModelConfig:
    """The model that `values` (by the format's keys) and `overrides` (by our fields) describe; `where` names the file in a `UserError`."""
    for key, allowed in family.supported.items():
        if values.get(key) not in allowed:
            names = " or ".join("none" if value is None else repr(value) for value in allowed)
            raise UserError(f"{where} has {key}: {reprlib.repr(values.get(key))}, which is not supported; expected {names}")
    unknown = sorted(set(overrides) - set(OVERRIDABLE))
    if unknown:
        raise UserError(f"frontend.overrides has the field {unknown[0]!r}, expected one of {', '.join(OVERRIDABLE)}")
    fields = {field: values.get(key, family.defaults.get(key)) for field, key in family.keys.items()} | dict(overrides)
    missing = [field for field in REQUIRED if fields[field] is None]
    if missing:
        raise UserError(f"{where} lacks {family.keys[missing[0]]}, which gives the model's {missing[0]}; use a complete checkpoint")
    return _checked(_complete(fields, family, where), where)


def weights(family: Family, config: ModelConfig) -> dict[str, Weight]:
    """Our tensors by name, those outside the layers first, and what each is made of."""
    order = [(name, 0) for name in LAYOUT if "{i}" not in name and not (name == HEAD and config.tied_embeddings)]
    order += [(name, i) for i in range(config.n_layers) for name in LAYOUT if "{i}" in name]
    return {name.format(i=i): _weight(family, config, name, i) for name, i in order}


def ignored(family: Family, config: ModelConfig) -> set[str]:
    """Names of the source tensors that may be there and carry nothing."""
    return {name.format(i=i) for name in family.ignored for i in range(config.n_layers)}


def sizes(config: ModelConfig) -> dict[str, int]:
    """The sizes that `LAYOUT` speaks of."""
    return {
        "vocab": config.vocab_size,
        "dim": config.dim,
        "hidden": config.hidden_dim,
        "q": config.n_heads * config.head_dim,
        "kv": config.n_kv_heads * config.head_dim,
    }


def _weight(family: Family, config: ModelConfig, name: str, layer: int) -> Weight:
    n = sizes(config)
    rows, columns = LAYOUT[name]
    tail = () if columns is None else (n[columns],)
    heads = {source: getattr(config, field) for source, field in (family.interleaved or {}).items()}
    parts = tuple(Part(source.format(i=layer), (n[size], *tail), heads.get(source)) for source, size in zip(family.sources[name], rows, strict=True))
    return Weight((sum(n[size] for size in rows), *tail), parts)


def _complete(fields: Mapping[str, object], family: Family, where: str) -> dict[str, object]:
    """Derive what may be left out: key-value heads, head_dim, and one window for every layer."""
    n_layers, n_heads, dim = fields["n_layers"], fields["n_heads"], fields["dim"]
    if type(n_layers) is not int or not 1 <= n_layers <= LAYER_LIMIT:
        raise UserError(f"{where} has {family.keys['n_layers']}: {n_layers!r}, expected a number of layers from 1 to {LAYER_LIMIT}")
    head_dim = fields["head_dim"]
    if head_dim is None and isinstance(dim, int) and isinstance(n_heads, int) and n_heads > 0:
        head_dim = dim // n_heads
    n_kv_heads = n_heads if fields["n_kv_heads"] is None else fields["n_kv_heads"]
    windows = (fields.get("sliding_window"),) * n_layers
    return {**fields, "family": family.family, "head_dim": head_dim, "n_kv_heads": n_kv_heads, "sliding_window": windows}


def _checked(fields: Mapping[str, object], where: str) -> ModelConfig:
    """The fields as a `ModelConfig`, once types, ranges and divisibility hold."""
    try:
        config = msgspec.convert(dict(fields), ModelConfig)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}, with frontend.overrides, does not describe a model: {error}") from error
    if config.n_heads % config.n_kv_heads:
        raise UserError(f"{where} has {config.n_heads} heads and {config.n_kv_heads} key-value heads, expected a multiple")
    if config.head_dim % 2:
        raise UserError(f"{where} gives a head_dim of {config.head_dim}, expected an even number, because rotary embedding rotates pairs")
    for name, value in (("norm_eps", config.norm_eps), ("rope_theta", config.rope_theta)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{where} gives a {name} of {value}, expected a positive number")
    return config
