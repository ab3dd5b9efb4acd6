"""The families table: how each checkpoint format names hyperparameters and tensors, and its defaults for missing keys.

To add a family, add a row. The names themselves are in `format_names.py`.
"""

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from export.checkpoints.format_names import (
    EXPERT_KEYS,
    GGUF_EACH_EXPERT,
    GGUF_EXPERT_KEYS,
    GGUF_EXPERTS,
    GGUF_KEYS,
    GGUF_ROPE_DIVISORS,
    GGUF_ROUTER,
    GGUF_SOURCES,
    GGUF_SUPPORTED,
    HUGGINGFACE_ARCHITECTURES,
    HUGGINGFACE_DECODERS,
    HUGGINGFACE_HEADS,
    HUGGINGFACE_IGNORED,
    HUGGINGFACE_KEYS,
    HUGGINGFACE_MOE_SOURCES,
    HUGGINGFACE_MOE_VARIANTS,
    HUGGINGFACE_SOURCES,
    HUGGINGFACE_SUPPORTED,
    HUGGINGFACE_WINDOWS,
    MISTRAL_EXPERT_KEYS,
    MISTRAL_IGNORED,
    MISTRAL_INTERLEAVED,
    MISTRAL_KEYS,
    MISTRAL_MOE_SOURCES,
    MISTRAL_SOURCES,
    MISTRAL_SUPPORTED,
    PLAIN_HEADS,
)
from runtime.artifact.manifest import HeadName
from runtime.errors import UserError

MODEL_NAMES = {"dense": "mistral", "mixture": "mixtral"}  # by the kind of layers; the model's name in a manifest


@dataclass(frozen=True)
class Family:
    """How one checkpoint format stores one family."""

    # The kind of feed-forward in a layer: a row of `export.checkpoints.tensor_layout.LAYERS`
    layers: Literal["dense", "mixture"]
    # Our field -> the format's key
    keys: Mapping[str, str]
    # Key -> the value that the format's own software assumes if the key is missing
    defaults: Mapping[str, object]
    # Key -> the values that our layers implement; None stands for absent or null
    supported: Mapping[str, tuple[object, ...]]
    # Our tensor -> the source tensors whose rows make it up, in order. A source that is named twice holds both pieces,
    # one after the other. For the experts' tensors, a name with {e} is repeated for each expert, and one without holds
    # all experts along its first axis.
    sources: Mapping[str, tuple[str, ...]]
    # Our tensor -> other `sources` of it, each taken instead if it is what a checkpoint stores
    variants: Mapping[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    # Tensors that carry no information
    ignored: tuple[str, ...] = ()
    # Tensors whose rotary pairs are rows 2d and 2d + 1 -> the field with their number of heads
    interleaved: Mapping[str, str] | None = None
    # Whether a list of windows that is shorter than the list of layers is repeated
    repeats_windows: bool = False
    # Class name of a whole model -> its head
    architectures: Mapping[str, HeadName] = field(default_factory=dict)
    # Head -> `sources` of its tensors
    heads: Mapping[HeadName, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)
    # Prefixes that the decoder's tensors may have -> what then precedes the head's; `sources` uses the first
    decoders: Mapping[str, str] = field(default_factory=dict)


# Defaults are those of the configuration classes in transformers 5.23: a window that a Mistral's config.json leaves out
# is 4096, and null means no window.
HUGGINGFACE_MISTRAL = Family(
    layers="dense",
    keys=HUGGINGFACE_KEYS | HUGGINGFACE_WINDOWS,
    defaults={
        "num_attention_heads": 32,
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
    architectures=HUGGINGFACE_ARCHITECTURES,
    heads=HUGGINGFACE_HEADS,
    decoders=HUGGINGFACE_DECODERS,
)

GGUF_LLAMA = Family(  # llama.cpp's name for both Llama and Mistral
    layers="dense",
    keys=GGUF_KEYS,
    defaults={"rope.freq_base": 10000.0, "tied_embeddings": True},
    supported=GGUF_SUPPORTED,
    sources=GGUF_SOURCES,
    ignored=(GGUF_ROPE_DIVISORS,),
    interleaved={"blk.{i}.attn_q.weight": "n_heads", "blk.{i}.attn_k.weight": "n_kv_heads"},
    heads=PLAIN_HEADS,
)
HUGGINGFACE_MINISTRAL3 = replace(
    HUGGINGFACE_MISTRAL,
    defaults={
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "max_position_embeddings": 262144,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 16.0,
            "original_max_position_embeddings": 16384,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "llama_4_scaling_beta": 0.1,
        },
    },
    supported={key: allowed for key, allowed in HUGGINGFACE_SUPPORTED.items() if key != "llama_4_scaling_beta"},
)

FAMILIES: Mapping[str, Mapping[str, Family]] = {
    "huggingface": {
        "mistral": HUGGINGFACE_MISTRAL,
        "ministral": HUGGINGFACE_MISTRAL,  # its config.json names the layers that have a window
        "ministral3": HUGGINGFACE_MINISTRAL3,  # its queries are scaled by their position
        "mixtral": Family(
            layers="mixture",
            keys=HUGGINGFACE_KEYS | HUGGINGFACE_WINDOWS | EXPERT_KEYS,
            defaults={
                "num_key_value_heads": 8,
                "rms_norm_eps": 1e-5,
                "rope_theta": 1e6,
                "tie_word_embeddings": False,
                "max_position_embeddings": 131072,
                "num_local_experts": 8,
                "num_experts_per_tok": 2,
            },
            supported=HUGGINGFACE_SUPPORTED,
            sources=HUGGINGFACE_MOE_SOURCES,
            variants=HUGGINGFACE_MOE_VARIANTS,
            ignored=HUGGINGFACE_IGNORED,
            architectures=HUGGINGFACE_ARCHITECTURES,
            heads=HUGGINGFACE_HEADS,
            decoders=HUGGINGFACE_DECODERS,
        ),
        "llama": Family(  # a Mistral without a window
            layers="dense",
            keys=HUGGINGFACE_KEYS,
            defaults={
                "rms_norm_eps": 1e-6,
                "rope_theta": 10000.0,
                "tie_word_embeddings": False,
                "max_position_embeddings": 2048,
            },
            supported=HUGGINGFACE_SUPPORTED | {"layer_types": (None,)},
            sources=HUGGINGFACE_SOURCES,
            ignored=HUGGINGFACE_IGNORED,
            architectures=HUGGINGFACE_ARCHITECTURES,
            heads=HUGGINGFACE_HEADS,
            decoders=HUGGINGFACE_DECODERS,
        ),
    },
    "mistral": {
        "dense": Family(
            layers="dense",
            keys=MISTRAL_KEYS,
            defaults={"tied_embeddings": False},
            supported=MISTRAL_SUPPORTED,
            sources=MISTRAL_SOURCES,
            ignored=MISTRAL_IGNORED,
            interleaved=MISTRAL_INTERLEAVED,
            repeats_windows=True,
            heads=PLAIN_HEADS,
        ),
        "moe": Family(
            layers="mixture",
            keys=MISTRAL_KEYS | MISTRAL_EXPERT_KEYS,
            defaults={"tied_embeddings": False},
            supported=MISTRAL_SUPPORTED,
            sources=MISTRAL_MOE_SOURCES,
            ignored=MISTRAL_IGNORED,
            interleaved=MISTRAL_INTERLEAVED,
            repeats_windows=True,
            heads=PLAIN_HEADS,
        ),
    },
    "gguf": {
        "llama": GGUF_LLAMA,
        "mistral3": GGUF_LLAMA,  # what llama.cpp calls Ministral 3 and later files of Mistral Small 3
    },
}


def find(kind: str, key: object, where: str) -> Family:
    """The row for a checkpoint format and the family that a checkpoint names; if none, `UserError` lists the rows."""
    rows = FAMILIES[kind]
    if not isinstance(key, str) or key not in rows:
        raise UserError(f"{where} names the architecture {key!r}, expected one of {', '.join(rows)}")
    return rows[key]


def gguf_mixture(dense: Family, stored: Collection[str]) -> Family:
    """The row of a GGUF whose layers have experts, given the row of its architecture and the names of its tensors."""
    merged = any(name.format(i=0) in stored for names in GGUF_EXPERTS.values() for name in names)
    kept = {ours: theirs for ours, theirs in dense.sources.items() if ".feed_forward." not in ours}
    return replace(
        dense,
        layers="mixture",
        keys={**dense.keys, **GGUF_EXPERT_KEYS},
        supported={key: values for key, values in dense.supported.items() if key != "expert_count"},
        sources=kept | GGUF_ROUTER | (GGUF_EXPERTS if merged else GGUF_EACH_EXPERT),
    )


def as_stored(family: Family, stored: Container[str]) -> Family:
    """A Hugging Face row with the names under which a checkpoint stores its tensors, among those that the row knows.

    They may also be Mistral's own, with its row order: the first release of Mixtral had a config.json beside them.
    """
    mistral = FAMILIES["mistral"][{"dense": "dense", "mixture": "moe"}[family.layers]]
    if mistral.sources["tok_embeddings.weight"][0] in stored:
        return replace(
            family,
            sources=mistral.sources,
            variants={},
            ignored=mistral.ignored,
            interleaved=mistral.interleaved,
            heads=mistral.heads,
            decoders=mistral.decoders,
        )
    usual = next(iter(family.decoders))

    def is_stored(sources: tuple[str, ...]) -> bool:
        name = sources[0].format(i=0, e=0).removeprefix(usual)
        return any(prefix + name in stored for prefix in family.decoders)

    chosen = {
        ours: next(filter(is_stored, variants), family.sources[ours]) for ours, variants in family.variants.items()
    }
    return replace(family, sources={**family.sources, **chosen}, variants={})
