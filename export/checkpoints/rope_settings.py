"""Reads the settings of rotary embedding in each format, and refuses those that a model's layers would not follow.

A setting that is read past changes every text in silence, so an unknown one that has a value is an error.
"""

import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from export.checkpoints.format_names import LAYER_TYPES
from export.checkpoints.json_files import convert
from runtime.artifact.rotary import LinearScaling, Llama3Scaling, Positions, QueryScaling, RopeScaling, YarnScaling
from runtime.errors import UserError

TOP_LEVEL = ("rope_theta", "rope_scaling", "rope_parameters")  # the keys of config.json that begin with "rope"
DEFAULT_BETA_FAST, DEFAULT_BETA_SLOW = 32.0, 1.0  # Peng et al., 2023, for Llama


@dataclass(frozen=True)
class Rotary:
    """What a checkpoint's rotary settings say besides `rope_theta`."""

    scaling: RopeScaling | None = None
    queries: QueryScaling | None = None


class _Parameters(msgspec.Struct, frozen=True):
    """`rope_parameters` of transformers 5, or `rope_scaling` in older files."""

    rope_type: str | None = None
    type: str | None = None  # the older spelling of rope_type
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    apply_yarn_scaling: bool | None = None  # of vLLM: whether there is an attention factor
    llama_4_scaling_beta: float | None = None
    max_position_embeddings: int | None = None  # a copy of the model's
    finetuned: bool | None = None  # says where a model comes from

    @property
    def kind(self) -> str:
        return self.rope_type or self.type or "default"


def huggingface_rotary(config: Mapping[str, object], context: object, where: str) -> tuple[dict[str, object], Rotary]:
    """The keys `rope_theta` and `partial_rotary_factor` of a config.json as far as it gives them, and the scaling.

    `rope_scaling` comes before `rope_parameters`, and what they hold before the same key beside them, as in
    transformers. `context` is the model's number of positions. Raises `UserError` for settings that differ by layer
    type, for unknown ones and for incomplete ones.
    """
    unknown = [key for key in config if key.startswith("rope") and key not in TOP_LEVEL and config[key] is not None]
    if unknown:
        raise UserError(
            f"{where} has {unknown[0]}: {reprlib.repr(config[unknown[0]])}, which is not supported; expected no key "
            f"that begins with rope but {', '.join(TOP_LEVEL)}"
        )
    given = _of_all_layers(config.get("rope_scaling") or config.get("rope_parameters") or {}, where)
    said = _parameters({key: value for key, value in given.items() if value is not None}, where)
    outside = config.get("original_max_position_embeddings")
    original = next((n for n in (outside, said.original_max_position_embeddings, context) if n is not None), None)
    scaling = KINDS[said.kind](said, _Contexts(context, original, where))
    plain = {"rope_theta": said.rope_theta, "partial_rotary_factor": said.partial_rotary_factor}
    return {key: value for key, value in plain.items() if value is not None}, Rotary(scaling, _queries(said, where))


def _parameters(given: Mapping[str, object], where: str) -> _Parameters:
    """The settings as a record of a known type; raises `UserError` for an unknown setting, and a factor of no type."""
    named = given.get("rope_type") or given.get("type")
    kind = "default" if named is None else named
    if not isinstance(kind, str) or kind not in KINDS:
        raise UserError(f"{where} has rope_type: {kind!r}, which is not supported; expected one of {', '.join(KINDS)}")
    unknown = sorted(set(given) - set(_Parameters.__struct_fields__))
    if unknown:
        raise UserError(
            f"{where} has the rotary setting {unknown[0]}: {reprlib.repr(given[unknown[0]])}, which is not supported; "
            f"expected some of {', '.join(_Parameters.__struct_fields__)}"
        )
    if named is None and given.get("factor", 1) != 1:
        raise UserError(
            f"{where} has a rotary factor of {reprlib.repr(given['factor'])} and no rope_type, which says what to do "
            f"with it; add rope_type, one of {', '.join(KINDS)}"
        )
    return convert(given, _Parameters, f"{where}, rotary")


def _of_all_layers(given: object, where: str) -> Mapping[str, object]:
    """The settings, which may be nested by layer type if they are the same for each."""
    if not isinstance(given, Mapping):
        raise UserError(f"{where} has rotary settings {reprlib.repr(given)}, expected an object")
    nested = [given[kind] for kind in LAYER_TYPES if kind in given]
    if not nested:
        return given
    if len(nested) != len(given) or any(settings != nested[0] for settings in nested):
        raise UserError(
            f"{where} has rotary settings that differ by layer type: {reprlib.repr(given)}, expected the same ones for "
            f"{' and '.join(LAYER_TYPES)}"
        )
    return _of_all_layers(nested[0], where)


class _Yarn(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The object `yarn` in params.json."""

    factor: float
    original_max_position_embeddings: int
    beta: float = DEFAULT_BETA_FAST
    alpha: float = DEFAULT_BETA_SLOW
    apply_scale: bool = True  # whether there is an attention factor


class _Llama4(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The object `llama_4_scaling` in params.json."""

    beta: float
    original_max_position_embeddings: int


def mistral_rotary(params: Mapping[str, object], where: str) -> Rotary:
    """The rotary settings of a params.json; raises `UserError` for unknown or incomplete ones.

    The names are read as vLLM reads them, since mistral-inference has no YaRN.
    """
    scaling = queries = None
    if params.get("yarn") is not None:
        yarn = convert(params["yarn"], _Yarn, f"{where}, yarn")
        scaling = checked(
            YarnScaling,
            where,
            factor=yarn.factor,
            original_context=yarn.original_max_position_embeddings,
            beta_fast=yarn.beta,
            beta_slow=yarn.alpha,
            attention_factor=yarn_magnitude(yarn.factor) if yarn.apply_scale else 1.0,
        )
    if params.get("llama_4_scaling") is not None:
        scaled = convert(params["llama_4_scaling"], _Llama4, f"{where}, llama_4_scaling")
        queries = checked(
            QueryScaling, where, beta=scaled.beta, original_context=scaled.original_max_position_embeddings
        )
    return Rotary(scaling, queries)


@dataclass(frozen=True)
class _Contexts:
    """Numbers of positions: the model's, and those of its first training."""

    model: object
    original: object
    where: str

    def original_positions(self) -> int:
        if self.original is None:
            raise UserError(f"{self.where} lacks original_max_position_embeddings, which its rotary scaling needs")
        return convert(self.original, Positions, f"{self.where}, original_max_position_embeddings")

    def growth(self) -> float | None:
        """How many times the model's positions are those of its first training; None if it does not say."""
        if self.model is None:
            return None
        return convert(self.model, Positions, f"{self.where}, max_position_embeddings") / self.original_positions()


def _linear(said: _Parameters, contexts: _Contexts) -> RopeScaling:
    return checked(LinearScaling, contexts.where, factor=said.factor)


def _llama3(said: _Parameters, contexts: _Contexts) -> RopeScaling:
    return checked(
        Llama3Scaling,
        contexts.where,
        factor=said.factor,
        low_freq_factor=said.low_freq_factor,
        high_freq_factor=said.high_freq_factor,
        original_context=contexts.original_positions(),
    )


def _yarn(said: _Parameters, contexts: _Contexts) -> RopeScaling:
    original = contexts.original_positions()
    factor = contexts.growth() if said.factor is None else said.factor
    attention_factor = said.attention_factor
    if attention_factor is None and factor is not None:
        attention_factor = _attention_factor(factor, said.mscale, said.mscale_all_dim)
    if said.apply_yarn_scaling is False and attention_factor != 1.0:
        raise UserError(
            f"{contexts.where} has apply_yarn_scaling: false and an attention factor of {attention_factor}, "
            "which contradict each other; expected attention_factor: 1.0"
        )
    return checked(
        YarnScaling,
        contexts.where,
        factor=factor,
        original_context=original,
        beta_fast=said.beta_fast or DEFAULT_BETA_FAST,
        beta_slow=said.beta_slow or DEFAULT_BETA_SLOW,
        attention_factor=attention_factor,
        truncate=said.truncate is not False,
    )


def _attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """The factor of cosines and sines: 0.1 m log(factor) + 1, for m = 1 or as a ratio of two (as in DeepSeek-V2)."""
    if mscale and mscale_all_dim:
        return yarn_ratio(factor, mscale, mscale_all_dim)
    return yarn_magnitude(factor)


def yarn_magnitude(factor: float, m: float = 1.0) -> float:
    """YaRN's sqrt(1 / t): 0.1 m log(factor) + 1, or 1 for a factor of at most 1 (Peng et al., 2023, section 3.4)."""
    return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0


def yarn_ratio(factor: float, m: float, other: float) -> float:
    """The magnitude for `m` over that for `other`; NaN, which no record accepts, if the latter is 0."""
    divisor = yarn_magnitude(factor, other)
    return yarn_magnitude(factor, m) / divisor if divisor else math.nan


def _queries(said: _Parameters, where: str) -> QueryScaling | None:
    if said.llama_4_scaling_beta is None:
        return None
    return checked(
        QueryScaling,
        where,
        beta=said.llama_4_scaling_beta,
        original_context=said.original_max_position_embeddings,
    )


R = TypeVar("R", bound=msgspec.Struct)


def checked(kind: type[R], where: str, **values: object) -> R:
    """The values as a record; raises `UserError` if one is missing or out of range."""
    given = {name: value for name, value in values.items() if value is not None}
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{where} has rotary settings that do not fit together: {error}") from error


KINDS: Mapping[str, Callable[[_Parameters, _Contexts], RopeScaling | None]] = {
    "default": lambda _said, _contexts: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}
