"""The families table: how each checkpoint format names hyperparameters and tensors, and its defaults for missing keys.

To add a family, add a row. Names from Hugging Face, GGUF and Mistral's own format appear only here.
"""

from collections.abc import Collection, Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from runtime.artifact.manifest import HeadName
from runtime.errors import UserError

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
LAYER_TYPES = ("full_attention", "sliding_attention")  # of Hugging Face's layer_types
HUGGINGFACE_WINDOWS = {"sliding_window": "sliding_window", "layer_types": "layer_types"}
HUGGINGFACE_SOURCES = {
    "tok_embeddings.weight": ("model.embed_tokens.weight",),
    "layers.{i}.attention_norm.weight": ("model.layers.{i}.input_layernorm.weight",),
    "layers.{i}.attention.wqkv.weight": tuple(f"model.layers.{{i}}.self_attn.{x}_proj.weight" for x in "qkv"),
    "layers.{i}.attention.wo.weight": ("model.layers.{i}.self_attn.o_proj.weight",),
    "layers.{i}.ffn_norm.weight": ("model.layers.{i}.post_attention_layernorm.weight",),
    "layers.{i}.feed_forward.w13.weight": (
        "model.layers.{i}.mlp.gate_proj.weight",
        "model.layers.{i}.mlp.up_proj.weight",
    ),
    "layers.{i}.feed_forward.w2.weight": ("model.layers.{i}.mlp.down_proj.weight",),
    "norm.weight": ("model.norm.weight",),
    "output.weight": ("lm_head.weight",),
}
HUGGINGFACE_SUPPORTED = {
    "hidden_act": ("silu", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "is_causal": (True, None),  # transformers lets every position see every other where this is false
    "partial_rotary_factor": (1.0, None),
    "llama_4_scaling_beta": (None,),
    "quantization_config": (None,),
}
HUGGINGFACE_MOE_SOURCES = {
    **{ours: theirs for ours, theirs in HUGGINGFACE_SOURCES.items() if ".feed_forward." not in ours},
    "layers.{i}.feed_forward.gate.weight": ("model.layers.{i}.block_sparse_moe.gate.weight",),
    "layers.{i}.feed_forward.experts.w13.weight": tuple(
        f"model.layers.{{i}}.block_sparse_moe.experts.{{e}}.w{x}.weight" for x in "13"
    ),
    "layers.{i}.feed_forward.experts.w2.weight": ("model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight",),
}
# How else transformers has stored a mixture: since release 5 under `mlp`, with all experts in one tensor.
HUGGINGFACE_MOE_VARIANTS = {
    "layers.{i}.feed_forward.gate.weight": (("model.layers.{i}.mlp.gate.weight",),),
    "layers.{i}.feed_forward.experts.w13.weight": (
        ("model.layers.{i}.mlp.experts.gate_up_proj",) * 2,
        tuple(f"model.layers.{{i}}.mlp.experts.{{e}}.w{x}.weight" for x in "13"),
    ),
    "layers.{i}.feed_forward.experts.w2.weight": (
        ("model.layers.{i}.mlp.experts.down_proj",),
        ("model.layers.{i}.mlp.experts.{e}.w2.weight",),
    ),
}
# A class of transformers is named after its decoder and its head, by the suffixes below.
HUGGINGFACE_CLASSES: Mapping[str, HeadName] = {
    "ForCausalLM": "causal_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "Model": "embedding",
}
HUGGINGFACE_ARCHITECTURES = {
    decoder + suffix: head
    for decoder in ("Mistral", "Ministral", "Ministral3", "Mixtral", "Llama")
    for suffix, head in HUGGINGFACE_CLASSES.items()
}
# Classes of models that also see images; whatever follows their decoder is a language model's head.
HUGGINGFACE_ARCHITECTURES |= {
    "Mistral3ForConditionalGeneration": "causal_lm",
    "LlavaForConditionalGeneration": "causal_lm",
}
HUGGINGFACE_HEADS: Mapping[HeadName, Mapping[str, tuple[str, ...]]] = {
    "causal_lm": {"output.weight": ("lm_head.weight",)},
    "sequence_classification": {"output.weight": ("score.weight",)},
    "token_classification": {"output.weight": ("score.weight",), "output.bias": ("score.bias",)},
    "question_answering": {"output.weight": ("qa_outputs.weight",), "output.bias": ("qa_outputs.bias",)},
    "embedding": {},
}
# How a decoder's tensors may begin, and how those of its head then do: "" in a bare model, "transformer." in
# LlamaForQuestionAnswering, "language_model." in models that also see images, as released or as transformers 5 names
# them.
HUGGINGFACE_DECODERS: Mapping[str, str] = {
    "model.": "",
    "": "",
    "transformer.": "",
    "language_model.model.": "language_model.",
    "model.language_model.": "",
}
HUGGINGFACE_IGNORED = (  # buffers that old releases and other libraries store; they follow from the configuration
    "model.rotary_emb.inv_freq",
    *(f"model.layers.{{i}}.self_attn.rotary_emb.{name}" for name in ("inv_freq", "cos_cached", "sin_cached")),
)

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
    "tied_embeddings": "tied_embeddings",  # GGUF has no such key: a head that is not stored is tied
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
GGUF_ROPE_DIVISORS = "rope_freqs.weight"  # read with the rotary settings
GGUF_SUPPORTED = {"expert_count": (0, None), "attention.causal": (True, None)}
GGUF_EXPERT_KEYS = {"n_experts": "expert_count", "experts_per_token": "expert_used_count"}
GGUF_ROUTER = {"layers.{i}.feed_forward.gate.weight": ("blk.{i}.ffn_gate_inp.weight",)}
GGUF_EXPERTS = {  # one tensor for all experts
    "layers.{i}.feed_forward.experts.w13.weight": ("blk.{i}.ffn_gate_exps.weight", "blk.{i}.ffn_up_exps.weight"),
    "layers.{i}.feed_forward.experts.w2.weight": ("blk.{i}.ffn_down_exps.weight",),
}
GGUF_EACH_EXPERT = {  # one for each, in files of before April 2024
    "layers.{i}.feed_forward.experts.w13.weight": ("blk.{i}.ffn_gate.{e}.weight", "blk.{i}.ffn_up.{e}.weight"),
    "layers.{i}.feed_forward.experts.w2.weight": ("blk.{i}.ffn_down.{e}.weight",),
}


MISTRAL_KEYS = {
    "dim": "dim",
    "hidden_dim": "hidden_dim",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "n_kv_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "vocab_size": "vocab_size",
    "norm_eps": "norm_eps",
    "rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "tied_embeddings": "tied_embeddings",
    "context_length": "max_seq_len",
}
MISTRAL_SOURCES = {
    "tok_embeddings.weight": ("tok_embeddings.weight",),
    "layers.{i}.attention_norm.weight": ("layers.{i}.attention_norm.weight",),
    "layers.{i}.attention.wqkv.weight": tuple(f"layers.{{i}}.attention.w{x}.weight" for x in "qkv"),
    "layers.{i}.attention.wo.weight": ("layers.{i}.attention.wo.weight",),
    "layers.{i}.ffn_norm.weight": ("layers.{i}.ffn_norm.weight",),
    "layers.{i}.feed_forward.w13.weight": tuple(f"layers.{{i}}.feed_forward.w{x}.weight" for x in "13"),
    "layers.{i}.feed_forward.w2.weight": ("layers.{i}.feed_forward.w2.weight",),
    "norm.weight": ("norm.weight",),
    "output.weight": ("output.weight",),
}
MISTRAL_MOE_SOURCES = {
    **{ours: theirs for ours, theirs in MISTRAL_SOURCES.items() if ".feed_forward." not in ours},
    "layers.{i}.feed_forward.gate.weight": ("layers.{i}.feed_forward.gate.weight",),
    "layers.{i}.feed_forward.experts.w13.weight": tuple(
        f"layers.{{i}}.feed_forward.experts.{{e}}.w{x}.weight" for x in "13"
    ),
    "layers.{i}.feed_forward.experts.w2.weight": ("layers.{i}.feed_forward.experts.{e}.w2.weight",),
}
MISTRAL_SUPPORTED = {
    "model_type": ("transformer", None),
    "quantization": (None,),
    "use_biases": (False, None),
    "causal": (True, None),
}
MISTRAL_IGNORED = ("rope.freqs",)
MISTRAL_INTERLEAVED = {"layers.{i}.attention.wq.weight": "n_heads", "layers.{i}.attention.wk.weight": "n_kv_heads"}
PLAIN_HEADS: Mapping[HeadName, Mapping[str, tuple[str, ...]]] = {
    "causal_lm": {"output.weight": ("output.weight",)},
    "embedding": {},
}
EXPERT_KEYS = {"n_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
MISTRAL_EXPERT_KEYS = {"n_experts": "num_experts", "experts_per_token": "num_experts_per_tok"}


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
