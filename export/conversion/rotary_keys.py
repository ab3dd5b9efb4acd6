"""A model's scaled rotary embedding in the keys of each checkpoint format."""

from collections.abc import Callable, Mapping
from typing import Any

from export.checkpoints.rope_settings import yarn_magnitude
from runtime.artifact.manifest import ModelConfig
from runtime.artifact.rotary import LinearScaling, Llama3Scaling, RopeScaling, YarnScaling
from runtime.errors import UserError

ORIGINAL = "original_max_position_embeddings"


def _yarn(scaling: YarnScaling) -> dict[str, object]:
    return {
        "rope_type": "yarn",
        "factor": scaling.factor,
        ORIGINAL: scaling.original_context,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "attention_factor": scaling.attention_factor,
        "truncate": scaling.truncate,
    }


def _llama3(scaling: Llama3Scaling) -> dict[str, object]:
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        ORIGINAL: scaling.original_context,
    }


def _linear(scaling: LinearScaling) -> dict[str, object]:
    return {"rope_type": "linear", "factor": scaling.factor}


HUGGINGFACE: Mapping[type, Callable[[Any], dict[str, object]]] = {
    type(None): lambda _scaling: {"rope_type": "default"},
    LinearScaling: _linear,
    Llama3Scaling: _llama3,
    YarnScaling: _yarn,
}


def rope_parameters(model: ModelConfig) -> dict[str, object]:
    """The `rope_parameters` of transformers 5; raises `UserError` for a scaling that no class of it has."""
    write = HUGGINGFACE.get(type(model.rope_scaling))
    if write is None:
        raise UserError(
            "the model divides each rotary frequency by a number of its own, which no class of transformers supports; "
            "use the checkpoint that the file was converted from"
        )
    keys = {**write(model.rope_scaling), "rope_theta": model.rope_theta}
    queries = model.query_scaling
    if queries is None:
        return keys
    if keys.setdefault(ORIGINAL, queries.original_context) != queries.original_context:
        raise UserError(
            f"the model scales queries by a context of {queries.original_context} positions and frequencies by one of "
            f"{keys[ORIGINAL]}, which no class of transformers supports, expected the same"
        )
    return {**keys, "llama_4_scaling_beta": queries.beta}


def mistral_keys(model: ModelConfig) -> dict[str, object]:
    """The keys of params.json; raises `UserError` for a scaling that Mistral's own format cannot express."""
    queries = model.query_scaling
    yarn: dict[str, object] = {} if model.rope_scaling is None else {"yarn": _own_yarn(model.rope_scaling)}
    if queries is None:
        return yarn
    return {**yarn, "llama_4_scaling": {"beta": queries.beta, ORIGINAL: queries.original_context}}


def _own_yarn(scaling: RopeScaling) -> dict[str, object]:
    if isinstance(scaling, YarnScaling) and scaling.truncate:
        for applied, factor in ((False, 1.0), (True, yarn_magnitude(scaling.factor))):
            if factor == scaling.attention_factor:
                return {
                    "factor": scaling.factor,
                    ORIGINAL: scaling.original_context,
                    "beta": scaling.beta_fast,
                    "alpha": scaling.beta_slow,
                    "apply_scale": applied,
                }
    raise UserError(
        f"the model has the rotary scaling {scaling}, which Mistral's own format cannot express, expected YaRN with "
        "its usual attention factor or none"
    )
