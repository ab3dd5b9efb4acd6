"""The families table: how each format names hyper-parameters and tensors, and what its own software assumes of those left out.

To add a family, add a row. Hugging Face's, GGUF's and Mistral's own names appear only here.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
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
    "rope_type": ("default",),
    "partial_rotary_factor": (1.0, None),
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
# A class of transformers is named after its decoder and its head; the tensors of each head.
HUGGINGFACE_CLASSES: Mapping[str, HeadName] = {
    "ForCausalLM": "causal_lm",
    "ForSequenceClassification": "sequence_classification",
    "ForTokenClassification": "token_classification",
    "ForQuestionAnswering": "question_answering",
    "Model": "embedding",
}
HUGGINGFACE_ARCHITECTURES = {
    decoder + suffix: head
    for decoder in ("Mistral", "Ministral", "Mixtral", "Llama")
    for suffix, head in HUGGINGFACE_CLASSES.items()
}
HUGGINGFACE_HEADS: Mapping[HeadName, Mapping[str, tuple[str, ...]]] = {
    "causal_lm": {"output.weight": ("lm_head.weight",)},
    "sequence_classification": {"output.weight": ("score.weight",)},
    "token_classification": {"output.weight": ("score.weight",), "output.bias": ("score.bias",)},
    "question_answering": {"output.weight": ("qa_outputs.weight",), "output.bias": ("qa_outputs.bias",)},
    "embedding": {},
}
HUGGINGFACE_DECODERS = (
    "model.",
    "",
    "transformer.",
)  # the second in a bare model, the third in LlamaForQuestionAnswering
HUGGINGFACE_IGNORED = (
    "model.layers.{i}.self_attn.rotary_emb.inv_freq",
)  # written by old releases; follows from rope_theta

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
    "lora": (None,),
    "vision_encoder": (None,),
    "quantization": (None,),
    "yarn": (None,),
    "llama_4_scaling": (None,),
    "use_biases": (False, None),
    "causal": (True, None),
}
MISTRAL_INTERLEAVED = {"layers.{i}.attention.wq.weight": "n_heads", "layers.{i}.attention.wk.weight": "n_kv_heads"}
PLAIN_HEADS: Mapping[HeadName, Mapping[str, tuple[str, ...]]] = {
    "causal_lm": {"output.weight": ("output.weight",)},
    "embedding": {},
}
EXPERT_KEYS = {"n_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok"}
MISTRAL_EXPERT_KEYS = {"n_experts": "num_experts", "experts_per_token": "num_experts_per_tok"}


MODEL_NAMES = {"dense": "mistral", "mixture": "mixtral"}  # by the kind of the layers; what a manifest calls the model


@dataclass(frozen=True)
class Family:
    """How one family is stored in one format."""

    layers: Literal[
        "dense", "mixture"
    ]  # the feed-forward of a layer: a row of `export.checkpoints.tensor_layout.LAYERS`
    keys: Mapping[str, str]  # our field -> the format's key
    defaults: Mapping[str, object]  # what the format's own software assumes of a key that is left out
    supported: Mapping[str, tuple[object, ...]]  # key -> the values that our block implements; None: absent or null
    sources: Mapping[
        str, tuple[str, ...]
    ]  # our tensor -> the tensors whose rows make it up, in order; {e}: once for each expert
    ignored: tuple[str, ...] = ()  # tensors that carry nothing
    interleaved: Mapping[str, str] | None = (
        None  # tensors whose rotary pairs are rows 2d, 2d + 1 -> the field that counts their heads
    )
    repeats_windows: bool = False  # a list of windows that is shorter than the layers is repeated
    architectures: Mapping[str, HeadName] = field(default_factory=dict)  # names of whole models -> their head
    heads: Mapping[HeadName, Mapping[str, tuple[str, ...]]] = field(
        default_factory=dict
    )  # head -> `sources` of its tensors
    decoders: tuple[str, ...] = ()  # what may stand in front of the decoder's tensors; in the table it is the first


# Defaults are those of the configuration classes in transformers 5.23: a window that a Mistral's config.json leaves out is 4096, null is none.
HUGGINGFACE_MISTRAL = Family(
    layers="dense",
    keys=HUGGINGFACE_KEYS | HUGGINGFACE_WINDOWS,
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
    architectures=HUGGINGFACE_ARCHITECTURES,
    heads=HUGGINGFACE_HEADS,
    decoders=HUGGINGFACE_DECODERS,
)

FAMILIES: Mapping[str, Mapping[str, Family]] = {
    "huggingface": {
        "mistral": HUGGINGFACE_MISTRAL,
        "ministral": HUGGINGFACE_MISTRAL,  # its config.json names the layers that have a window
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
            interleaved=MISTRAL_INTERLEAVED,
            repeats_windows=True,
            heads=PLAIN_HEADS,
        ),
    },
    "gguf": {
        "llama": Family(  # what llama.cpp calls Llama and Mistral alike
            layers="dense",
            keys=GGUF_KEYS,
            defaults={"rope.freq_base": 10000.0, "tied_embeddings": True},
            supported=GGUF_SUPPORTED,
            sources=GGUF_SOURCES,
            interleaved={"blk.{i}.attn_q.weight": "n_heads", "blk.{i}.attn_k.weight": "n_kv_heads"},
            heads=PLAIN_HEADS,
        ),
    },
}


def find(kind: str, key: object, where: str) -> Family:
    """The row of a format and the family that the checkpoint names; `UserError` lists those that exist."""
    rows = FAMILIES[kind]
    if not isinstance(key, str) or key not in rows:
        raise UserError(f"{where} names the architecture {key!r}, expected one of {', '.join(rows)}")
    return rows[key]
