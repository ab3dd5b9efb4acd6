"""Turns a format's hyperparameters into a checked `ModelConfig`: overrides, defaults and every notation of windows."""

import math
import reprlib
from collections.abc import Mapping, Sequence

import msgspec

from export.checkpoints.families import MODEL_NAMES, Family
from export.checkpoints.format_names import LAYER_TYPES
from export.checkpoints.rope_settings import Rotary
from runtime.artifact.manifest import LAYER_LIMIT, ModelConfig
from runtime.artifact.rotary import YarnScaling
from runtime.errors import UserError

OVERRIDABLE = ("context_length", "norm_eps", "rope_theta", "sliding_window")  # fields that change no weight's shape
REQUIRED = ("dim", "hidden_dim", "n_layers", "n_heads", "vocab_size", "norm_eps", "rope_theta", "tied_embeddings")
REQUIRED_OF_MIXTURES = ("n_experts", "experts_per_token")
UNSCALED = Rotary()


def model_config(
    family: Family,
    values: Mapping[str, object],
    overrides: Mapping[str, object],
    where: str,
    rotary: Rotary = UNSCALED,
) -> ModelConfig:
    """The model that `values` (by the format's keys), `overrides` (by our fields) and `rotary` describe.

    `where` names the file in a `UserError`.
    """
    for key, allowed in family.supported.items():
        if values.get(key) not in allowed:
            names = " or ".join("none" if value is None else repr(value) for value in allowed)
            raise UserError(
                f"{where} has {key}: {reprlib.repr(values.get(key))}, which is not supported; expected {names}"
            )
    unknown = sorted(set(overrides) - set(OVERRIDABLE))
    if unknown:
        raise UserError(f"frontend.overrides has the field {unknown[0]!r}, expected one of {', '.join(OVERRIDABLE)}")
    fields = {field: values.get(key, family.defaults.get(key)) for field, key in family.keys.items()} | dict(overrides)
    if "sliding_window" in overrides:  # it sets every layer's window, whatever the checkpoint says about its layers
        fields["layer_types"] = None
    required = (*REQUIRED, *(REQUIRED_OF_MIXTURES if family.layers == "mixture" else ()))
    missing = [field for field in required if fields[field] is None]
    if missing:
        raise UserError(
            f"{where} lacks {family.keys[missing[0]]}, which gives the model's {missing[0]}; use a complete checkpoint"
        )
    model = _checked(_complete(fields, family, where, overridden="sliding_window" in overrides), where)
    if isinstance(rotary.scaling, YarnScaling) and model.rope_theta <= 1:
        raise UserError(
            f"{where} gives a rope_theta of {model.rope_theta} with YaRN, which needs frequencies that fall from pair "
            "to pair, expected a number above 1"
        )
    return msgspec.structs.replace(model, rope_scaling=rotary.scaling, query_scaling=rotary.queries)


def _complete(fields: Mapping[str, object], family: Family, where: str, *, overridden: bool) -> dict[str, object]:
    """Derive key-value heads and head_dim where they are left out, and give every layer its window."""
    n_layers, n_heads, dim = fields["n_layers"], fields["n_heads"], fields["dim"]
    if type(n_layers) is not int or not 1 <= n_layers <= LAYER_LIMIT:
        raise UserError(
            f"{where} has {family.keys['n_layers']}: {n_layers!r}, expected a number of layers from 1 to {LAYER_LIMIT}"
        )
    head_dim = fields["head_dim"]
    if head_dim is None and isinstance(dim, int) and isinstance(n_heads, int) and n_heads > 0:
        head_dim = dim // n_heads
    n_kv_heads = n_heads if fields["n_kv_heads"] is None else fields["n_kv_heads"]
    repeats = family.repeats_windows or overridden
    windows = layer_windows(
        fields.get("sliding_window"), fields.get("layer_types"), n_layers, repeats=repeats, where=where
    )
    kept = {name: value for name, value in fields.items() if name != "layer_types"}
    return {
        **kept,
        "family": MODEL_NAMES[family.layers],
        "head_dim": head_dim,
        "n_kv_heads": n_kv_heads,
        "sliding_window": windows,
    }


def layer_windows(
    window: object, layer_types: object, n_layers: int, *, repeats: bool, where: str
) -> tuple[object, ...]:
    """One window, or None, for each layer.

    The family's files give a number, null, a list, or a number with `layer_types`. A list holds one entry per layer; if
    the format `repeats` it, a shorter list is a pattern, as Mistral's own software reads it. The entries themselves are
    checked with the other fields. Raises `UserError` for anything else.
    """
    if isinstance(window, Sequence) and not isinstance(window, str):
        if layer_types is not None:
            raise UserError(
                f"{where} has both a list of windows and layer_types, expected one of them; remove the other"
            )
        if not window or (n_layers % len(window) if repeats else n_layers != len(window)):
            expected = (
                f"a number that divides its {n_layers} layers" if repeats else f"one for each of its {n_layers} layers"
            )
            raise UserError(f"{where} lists {len(window)} windows in sliding_window, expected {expected}")
        return tuple(window) * (n_layers // len(window))
    if layer_types is None:
        return (window,) * n_layers
    if not isinstance(layer_types, Sequence) or isinstance(layer_types, str) or len(layer_types) != n_layers:
        raise UserError(
            f"{where} has layer_types {reprlib.repr(layer_types)}, "
            f"expected a list with one entry for each of its {n_layers} layers"
        )
    unknown = [kind for kind in layer_types if kind not in LAYER_TYPES]
    if unknown:
        raise UserError(f"{where} has {unknown[0]!r} among its layer_types, expected {' or '.join(LAYER_TYPES)}")
    if window is None and "sliding_attention" in layer_types:
        raise UserError(
            f"{where} has sliding_attention among its layer_types but no sliding_window; expected a number of positions"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def _checked(fields: Mapping[str, object], where: str) -> ModelConfig:
    """The fields as a `ModelConfig`, with types, ranges and divisibility checked."""
    try:
        config = msgspec.convert(dict(fields), ModelConfig)
    except msgspec.ValidationError as error:
        raise UserError(f"{where}, with frontend.overrides, does not describe a model: {error}") from error
    if config.n_heads % config.n_kv_heads:
        raise UserError(
            f"{where} has {config.n_heads} heads and {config.n_kv_heads} key-value heads, "
            "expected the first number to be a multiple of the second"
        )
    if config.head_dim % 2:
        raise UserError(
            f"{where} gives a head_dim of {config.head_dim}, "
            "expected an even number, because rotary embedding rotates pairs"
        )
    if (
        config.n_experts is not None
        and config.experts_per_token is not None
        and config.experts_per_token > config.n_experts
    ):
        raise UserError(
            f"{where} gives each token {config.experts_per_token} of {config.n_experts} experts, "
            "expected at most all of them"
        )
    for name, value in (("norm_eps", config.norm_eps), ("rope_theta", config.rope_theta)):
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{where} gives a {name} of {value}, expected a positive number")
    return config
