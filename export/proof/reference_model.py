"""The reference implementation: Hugging Face `transformers`, loaded with the checkpoint's own weights in float32."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from export.checkpoints.checkpoint import open_checkpoint
from export.checkpoints.gguf.checkpoint import file_for_transformers
from export.checkpoints.huggingface.folder import WITH_IMAGES
from export.checkpoints.huggingface.quantization_settings import quantization_settings
from export.checkpoints.huggingface.tensors import is_read_by_transformers
from export.checkpoints.json_files import read_json
from export.checkpoints.location import detect
from export.checkpoints.quantized.methods import METHOD
from export.conversion.convert import write_as
from export.conversion.rotary_keys import rope_parameters
from export.conversion.target_formats import layer_types, transformers_model
from runtime.artifact.manifest import HeadName, ModelConfig

TEXT_MODEL = "language_model."  # how the text model's tensors begin in a model that also sees images
FLOAT8_METHOD = "fp8"  # the quantization that transformers reads without another package
PADDING_ID = 0  # any valid id: it only decides which position is the last, and every position is compared


@dataclass(frozen=True)
class ReferenceHead:
    """The Auto class of `transformers` for a head, and the module whose result is the head's output for every token."""

    automatic: Any
    module: str


REFERENCE_HEADS: Mapping[HeadName, ReferenceHead] = {
    "causal_lm": ReferenceHead(transformers.AutoModelForCausalLM, "lm_head"),
    "sequence_classification": ReferenceHead(transformers.AutoModelForSequenceClassification, "score"),
    "token_classification": ReferenceHead(transformers.AutoModelForTokenClassification, "score"),
    "question_answering": ReferenceHead(transformers.AutoModelForQuestionAnswering, "qa_outputs"),
    "embedding": ReferenceHead(transformers.AutoModel, "norm"),
}


REFERENCE_CONFIGS: Mapping[str, Any] = {  # by `model_type`
    "mistral": transformers.MistralConfig,
    "ministral": transformers.MinistralConfig,
    "ministral3": transformers.Ministral3Config,
    "mixtral": transformers.MixtralConfig,
}


def load_reference(path: Path, kind: str, model: ModelConfig, adapter: Path | None = None) -> torch.nn.Module:
    """The `transformers` model in float32; windows and overrides are those of `model`.

    It reads the weights itself, except for forms that `transformers` does not read, and with an adapter.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    automatic = REFERENCE_HEADS[model.head].automatic
    loaded = _load(path, detect(path) if kind == "auto" else kind, automatic, adapter)
    config = reference_config(model, loaded.config.get_text_config().to_dict())
    with torch.device("meta"):
        reference = automatic.from_config(config, attn_implementation="eager")
    # LlamaForQuestionAnswering has a prefix of its own, and so has the text model of one that sees images.
    theirs, ours = f"{loaded.base_model_prefix}.", f"{reference.base_model_prefix}."
    # Where transformers dequantizes, it leaves the other tensors as they are stored.
    state = {name: tensor.float() for name, tensor in loaded.state_dict().items()}
    if any(name.startswith(f"{theirs}{TEXT_MODEL}") for name in state):
        state = {name: tensor for name, tensor in state.items() if TEXT_MODEL in name or not name.startswith(theirs)}
        theirs += TEXT_MODEL
    weights = {
        ours + name.removeprefix(theirs) if name.startswith(theirs) else name: tensor for name, tensor in state.items()
    }
    reference.load_state_dict(weights, strict=True, assign=True)
    reference.tie_weights()
    decoder = reference.base_model
    decoder.rotary_emb = type(decoder.rotary_emb)(config)  # its buffers are computed, not loaded
    return reference.eval()


def _load(
    path: Path,
    kind: str,
    automatic: Any,  # noqa: ANN401 (one of the classes named AutoModel...)
    adapter: Path | None,
) -> torch.nn.Module:
    """The checkpoint as `transformers` reads it, or as we read it where `transformers` does not."""
    file = file_for_transformers(path) if kind == "gguf" else None
    if file is not None:
        return automatic.from_pretrained(file.parent, dtype=torch.float32, gguf_file=file.name)
    if kind == "huggingface" and adapter is None and _is_read_by_transformers(path):
        if transformers.AutoConfig.from_pretrained(path).model_type in WITH_IMAGES:
            automatic = transformers.AutoModelForImageTextToText
        return automatic.from_pretrained(path, dtype=torch.float32)
    with tempfile.TemporaryDirectory(prefix="reference-") as temporary:
        folder = Path(temporary) / "model"
        source = path if path.is_dir() else path.parent
        write_as("huggingface", open_checkpoint(path, kind, {}, adapter=adapter), source, folder)
        return automatic.from_pretrained(folder, dtype=torch.float32)


def _is_read_by_transformers(folder: Path) -> bool:
    """Whether transformers reads a folder as it is.

    For quantized weights, and for a `quantization_config` that stayed behind, it would want the package that such
    weights need.
    """
    said = quantization_settings(folder, read_json(folder / "config.json"))
    as_it_says = said is None or said.get(METHOD) == FLOAT8_METHOD
    return as_it_says and is_read_by_transformers(folder)


def reference_config(model: ModelConfig, values: dict[str, object]) -> transformers.PretrainedConfig:
    """The configuration of the class that implements this model, with `values` from the checkpoint's own configuration.

    A Llama without biases is a Mistral. Raises `UserError` for windows of several sizes, which no class supports.
    """
    name = transformers_model(model)
    left_out = ("model_type", "architectures", "transformers_version", "layer_types")
    kept = {name: value for name, value in values.items() if name not in left_out}
    kept |= {
        "sliding_window": next((window for window in model.sliding_window if window is not None), None),
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope_parameters(model),
    }
    if model.head == "sequence_classification" and kept.get("pad_token_id") is None:
        kept["pad_token_id"] = PADDING_ID  # without one, the class refuses a batch
    if model.context_length is not None:
        kept["max_position_embeddings"] = model.context_length
    return REFERENCE_CONFIGS[name](**kept, **layer_types(model))


def reference_logits(model: torch.nn.Module, ids: NDArray[np.int64], head: HeadName) -> NDArray[np.float32]:
    """The head's outputs (B, n, n_outputs) at every position of ids (B, n), in one pass without a cache.

    They are taken from the head itself, since a sequence classification model returns only the last position.
    """
    outputs: list[torch.Tensor] = []
    hook = model.get_submodule(REFERENCE_HEADS[head].module).register_forward_hook(
        lambda _module, _inputs, result: outputs.append(result)
    )
    with torch.no_grad():
        model(torch.from_numpy(ids), use_cache=False)
    hook.remove()
    (found,) = outputs
    logits: NDArray[np.float32] = found.numpy()
    return logits
