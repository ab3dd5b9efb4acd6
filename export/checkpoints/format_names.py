"""The names that each checkpoint format gives to hyperparameters, tensors and whole models.

They appear only here; `families.py` makes the rows of the families table from them.
"""

from collections.abc import Mapping

from runtime.artifact.manifest import HeadName

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
    "LlavaNextForConditionalGeneration": "causal_lm",
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
