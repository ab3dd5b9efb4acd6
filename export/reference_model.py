"""The implementation that we did not write: Hugging Face `transformers`, loaded with the checkpoint's own weights in float32."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from export.checkpoint import detect

OVERRIDE_NAMES = {"norm_eps": "rms_norm_eps", "context_length": "max_position_embeddings", "sliding_window": "sliding_window"}


def load_reference(path: Path, kind: str, overrides: Mapping[str, object]) -> torch.nn.Module:
    """MistralForCausalLM in float32 with the checkpoint's weights, read by `transformers` itself, and with our overrides."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gguf = (detect(path) if kind == "auto" else kind) == "gguf"
    source, extra = (path.parent, {"gguf_file": path.name}) if gguf else (path, {})
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **extra)
    return _as_mistral(model, overrides).eval()


def _as_mistral(model: torch.nn.Module, overrides: Mapping[str, object]) -> torch.nn.Module:
    """The same weights under MistralConfig; a Llama without biases is a Mistral without a window."""
    values = model.config.to_dict()
    if values["model_type"] != "mistral":
        values["sliding_window"] = None
    for name, value in overrides.items():
        if name == "rope_theta":
            values["rope_parameters"] = {**values["rope_parameters"], "rope_theta": value}
        else:
            values[OVERRIDE_NAMES[name]] = value
    kept = {name: value for name, value in values.items() if name not in ("model_type", "architectures", "transformers_version")}
    config = transformers.MistralConfig(**kept, attn_implementation="eager")
    with torch.device("meta"):
        mistral = transformers.MistralForCausalLM(config)
    mistral.load_state_dict(model.state_dict(), strict=True, assign=True)
    mistral.tie_weights()
    mistral.model.rotary_emb = type(mistral.model.rotary_emb)(config)  # its buffers are computed, not loaded
    return mistral


def reference_logits(model: torch.nn.Module, ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Logits at every position, (B, n, vocab), of ids (B, n), in one pass without a cache."""
    with torch.no_grad():
        logits: NDArray[np.float32] = model(torch.from_numpy(ids), use_cache=False).logits.numpy()
    return logits
