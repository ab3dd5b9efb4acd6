"""The implementation that we did not write: Hugging Face `transformers`, loaded with the checkpoint's own weights in float32."""

from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from export.checkpoint import detect
from runtime.errors import UserError
from runtime.manifest import ModelConfig


def load_reference(path: Path, kind: str, model: ModelConfig) -> torch.nn.Module:
    """`transformers` in float32, its weights read by `transformers` itself, its windows and overrides as `model` says."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gguf = (detect(path) if kind == "auto" else kind) == "gguf"
    source, extra = (path.parent, {"gguf_file": path.name}) if gguf else (path, {})
    loaded = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **extra)
    config = reference_config(model, loaded.config.to_dict())
    with torch.device("meta"):
        reference = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    reference.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    reference.tie_weights()
    reference.model.rotary_emb = type(reference.model.rotary_emb)(config)  # its buffers are computed, not loaded
    return reference.eval()


def reference_config(model: ModelConfig, values: dict[str, object]) -> transformers.PretrainedConfig:
    """The configuration class that has this model's mathematics, with `values` of the checkpoint's own: a Llama without biases is a Mistral.

    Raises `UserError` for windows of several sizes, which no class has.
    """
    sizes = {window for window in model.sliding_window if window is not None}
    interleaved = len(set(model.sliding_window)) > 1
    if len(sizes) > 1 or (interleaved and model.n_experts is not None):
        mixture = " and a mixture of experts" if model.n_experts is not None else ""
        raise UserError(f"the layers have windows of {sorted(sizes)} positions{mixture}, which no model of transformers has; it cannot be compared")
    left_out = ("model_type", "architectures", "transformers_version", "layer_types")
    kept = {name: value for name, value in values.items() if name not in left_out}
    kept |= {
        "sliding_window": next(iter(sizes), None),
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
    }
    if model.context_length is not None:
        kept["max_position_embeddings"] = model.context_length
    if model.n_experts is not None:
        return transformers.MixtralConfig(**kept)
    if interleaved:
        return transformers.MinistralConfig(
            **kept, layer_types=["sliding_attention" if window else "full_attention" for window in model.sliding_window]
        )
    return transformers.MistralConfig(**kept)


def reference_logits(model: torch.nn.Module, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits at every position, (B, n, vocab), of ids (B, n), in one pass without a cache."""
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    return logits
