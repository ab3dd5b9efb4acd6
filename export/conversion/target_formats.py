"""A model in another checkpoint format: hyperparameters by the format's keys, and stored tensors under its names."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from export.checkpoints.checkpoint import Checkpoint
from export.checkpoints.families import FAMILIES, Family
from export.checkpoints.format_names import MISTRAL_EXPERT_KEYS
from export.checkpoints.mistral.folder import window_pattern
from export.checkpoints.source import Array
from export.checkpoints.tensor_layout import AssembledTensor, weights
from export.conversion.rotary_keys import mistral_keys, rope_parameters
from runtime.artifact.manifest import ModelConfig
from runtime.errors import UserError

HUGGINGFACE_MODELS = {
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
}


@dataclass(frozen=True)
class FormTensors:
    """A checkpoint's tensors under the names of another format, each with its stored dtype, read a block at a time."""

    checkpoint: Checkpoint  # with the format's names, and one part for each tensor
    interleaved_heads: Mapping[str, int]  # tensors whose rotary pairs are neighbouring rows -> their number of heads

    def names(self) -> tuple[str, ...]:
        """Every tensor by the format's name."""
        return self.checkpoint.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return self.checkpoint.shape(name)

    def dtype(self, name: str) -> str:
        """Dtype of one tensor, as stored."""
        return self.checkpoint.dtype(name)

    def blocks(self, name: str) -> Iterator[Array]:
        """The rows of one tensor in order, a bounded number of bytes at a time."""
        heads = self.interleaved_heads.get(name)
        yield from (
            self.checkpoint.blocks(name) if heads is None else (neighbour_rows(self.checkpoint.tensor(name), heads),)
        )

    def tensor(self, name: str) -> Array:
        """One tensor, whole."""
        return np.concatenate(list(self.blocks(name)))


def huggingface_config(model: ModelConfig) -> dict[str, object]:
    """The config.json, without ids and dtype, for the class of transformers that implements this model.

    Raises `UserError` for a model that no class implements: one with windows of several sizes, or a mixture whose
    layers have different windows.
    """
    key = transformers_model(model)
    fields = _values(model, _huggingface_family(model))
    config = {"architectures": [HUGGINGFACE_MODELS[key]], "model_type": key, "hidden_act": "silu", **fields}
    config["sliding_window"] = next((window for window in model.sliding_window if window is not None), None)
    if model.rope_scaling is not None or model.query_scaling is not None:
        config["rope_parameters"] = rope_parameters(model)
    return config | layer_types(model)


def layer_types(model: ModelConfig) -> dict[str, list[str]]:
    """The key that says which layers have a window, for a model whose layers differ in that."""
    if len(set(model.sliding_window)) == 1:
        return {}
    return {"layer_types": ["sliding_attention" if window else "full_attention" for window in model.sliding_window]}


def huggingface_tensors(checkpoint: Checkpoint) -> FormTensors:
    """The tensors of a causal language model under Hugging Face's names; raises as `huggingface_config` does."""
    return _renamed(checkpoint, _huggingface_family(checkpoint.model))


def mistral_params(model: ModelConfig) -> dict[str, object]:
    """The params.json of a causal language model in Mistral's own format."""
    params = _values(model, FAMILIES["mistral"][_mistral_key(model)])
    experts = {key: params.pop(key) for key in MISTRAL_EXPERT_KEYS.values() if key in params}
    windows = window_pattern(model.sliding_window)
    if windows != (None,):
        params["sliding_window"] = windows[0] if len(windows) == 1 else list(windows)
    params |= mistral_keys(model)
    return {**params, "moe": experts} if experts else params


def mistral_tensors(checkpoint: Checkpoint) -> FormTensors:
    """The tensors of a causal language model under Mistral's own names, with rotary pairs in neighbouring rows."""
    return _renamed(checkpoint, FAMILIES["mistral"][_mistral_key(checkpoint.model)])


def neighbour_rows(rows: Array, heads: int) -> Array:
    """Reorder the rows (heads * head_dim, columns) from half-split to interleaved pairs, inverting `half_split_rows`.

    Worked example, head_dim 6: rows 0 1 2 3 4 5 (pairs 0 3, 1 4, 2 5) become 0 3 1 4 2 5.
    """
    split = rows.reshape(heads, 2, -1, rows.shape[-1])  # (heads, 2, head_dim / 2, columns)
    return split.swapaxes(1, 2).reshape(rows.shape)


def transformers_model(model: ModelConfig) -> str:
    """The `model_type` of the class of transformers that implements a model; raises `UserError` if none does."""
    sizes = sorted({window for window in model.sliding_window if window is not None})
    interleaved, mixture = len(set(model.sliding_window)) > 1, model.n_experts is not None
    if model.query_scaling is not None and (interleaved or mixture):
        raise UserError(
            "queries are scaled by their position in a mixture of experts or in layers that differ in their window, "
            "which no class of transformers supports, expected neither"
        )
    if len(sizes) > 1:
        raise UserError(
            f"the layers have windows of {sizes} positions, which no class of transformers supports, expected one size"
        )
    if interleaved and mixture:
        raise UserError(
            "the layers of a mixture of experts differ in their window, which no class of transformers supports, "
            "expected the same window in all"
        )
    if model.query_scaling is not None:
        return "ministral3"
    return "mixtral" if mixture else "ministral" if interleaved else "mistral"


def _huggingface_family(model: ModelConfig) -> Family:
    _check_head(model)
    return FAMILIES["huggingface"][transformers_model(model)]


def _mistral_key(model: ModelConfig) -> str:
    _check_head(model)
    return "dense" if model.n_experts is None else "moe"


def _check_head(model: ModelConfig) -> None:
    if not model.generates:
        raise UserError(
            f"the model has the head {model.head}, which only its own format supports, expected a causal language model"
        )


def _values(model: ModelConfig, family: Family) -> dict[str, object]:
    """The hyperparameters that a model has, except its windows, by the format's keys."""
    fields = {
        ours: getattr(model, ours)
        for ours in family.keys
        if ours in ModelConfig.__struct_fields__ and ours != "sliding_window"
    }
    return {family.keys[ours]: value for ours, value in fields.items() if value is not None}


def _renamed(checkpoint: Checkpoint, family: Family) -> FormTensors:
    """The parts of our tensors, which both formats split in the same places, under the names of `family`."""
    layout = weights(family, checkpoint.model)
    pairs = [
        (wanted, stored)
        for name, weight in layout.items()
        for wanted, stored in zip(weight.parts, checkpoint.weights[name].parts, strict=True)
    ]
    single = {wanted.source: AssembledTensor(wanted.shape, (stored,)) for wanted, stored in pairs}
    heads = {wanted.source: wanted.interleaved_heads for wanted, _ in pairs if wanted.interleaved_heads is not None}
    return FormTensors(replace(checkpoint, weights=single), heads)
