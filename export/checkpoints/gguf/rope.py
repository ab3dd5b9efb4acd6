"""Reads the rotary settings of a GGUF header, and the divisors of the frequencies that a file may hold as a tensor.

The keys mean what llama.cpp makes of them (llama-model.cpp, llama-context.cpp and ggml-cpu/ops.cpp). It reads
`yarn_beta_fast` and `yarn_beta_slow` only for some architectures; here they always count, as the model was trained.
"""

import reprlib
from collections.abc import Mapping, Sequence

import msgspec

from export.checkpoints.json_files import convert
from export.checkpoints.rope_settings import Rotary, checked, yarn_magnitude, yarn_ratio
from runtime.artifact.rotary import DivisorScaling, LinearScaling, QueryScaling, RopeScaling, YarnScaling
from runtime.errors import UserError

PREFIX = "rope."
TYPES = ("none", "linear", "yarn")
KEYS = {
    "freq_base": "rope.freq_base",
    "dimension_count": "rope.dimension_count",
    "type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "linear_factor": "rope.scale_linear",
    "attention_factor": "rope.scaling.attn_factor",
    "original_context": "rope.scaling.original_context_length",
    "finetuned": "rope.scaling.finetuned",
    "log_multiplier": "rope.scaling.yarn_log_multiplier",
    "beta_fast": "rope.scaling.yarn_beta_fast",
    "beta_slow": "rope.scaling.yarn_beta_slow",
}


class _Rope(msgspec.Struct, frozen=True, rename=KEYS):
    """The keys that begin with `rope.`."""

    freq_base: float | None = None
    dimension_count: int | None = None
    type: str = "linear"  # of a file that has a factor and no type
    factor: float = 0.0  # 0 means none
    linear_factor: float = 0.0  # the older name of the factor
    attention_factor: float = 1.0
    original_context: int | None = None
    finetuned: bool | None = None  # says where a model comes from
    log_multiplier: float = 0.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0


class _Model(msgspec.Struct, frozen=True):
    """The other keys that rotary embedding depends on."""

    context_length: int | None = None
    key_length: int | None = msgspec.field(name="attention.key_length", default=None)
    embedding_length: int | None = None
    head_count: int | None = msgspec.field(name="attention.head_count", default=None)
    temperature: float = msgspec.field(name="attention.temperature_scale", default=0.0)

    @property
    def head_dim(self) -> int | None:
        if self.key_length is None and self.embedding_length and self.head_count:
            return self.embedding_length // self.head_count
        return self.key_length


def gguf_rotary(values: Mapping[str, object], divisors: Sequence[float] | None, where: str) -> Rotary:
    """The rotary settings of a header, whose architecture's prefix has been removed from its keys.

    `divisors` are the numbers of the tensor `rope_freqs.weight`, if the file has it. Raises `UserError` for settings
    that are unknown or that do not fit the model.
    """
    given = {key: value for key, value in values.items() if key.startswith(PREFIX)}
    unknown = sorted(set(given) - set(KEYS.values()))
    if unknown:
        raise UserError(
            f"{where} has {unknown[0]}: {reprlib.repr(given[unknown[0]])}, which is not supported; expected no key "
            f"that begins with {PREFIX} but {', '.join(KEYS.values())}"
        )
    said = convert(given, _Rope, where)
    model = convert(values, _Model, where)
    if said.type not in TYPES:
        raise UserError(
            f"{where} has {KEYS['type']}: {said.type!r}, which is not supported; expected one of {', '.join(TYPES)}"
        )
    if said.dimension_count not in (None, model.head_dim):
        raise UserError(
            f"{where} has {KEYS['dimension_count']}: {said.dimension_count}, expected all {model.head_dim} dimensions "
            "of a head: partial rotary embedding is not supported"
        )
    if divisors is not None and model.head_dim is not None and len(divisors) != model.head_dim // 2:
        raise UserError(
            f"{where} has {len(divisors)} divisors of rotary frequencies, expected {model.head_dim // 2}, one for each "
            "pair of a head's dimensions; fetch the file again"
        )
    return Rotary(_scaling(said, model, divisors, where), _queries(said, model, where))


def _scaling(said: _Rope, model: _Model, divisors: Sequence[float] | None, where: str) -> RopeScaling | None:
    factor = 1.0 if said.type == "none" else said.factor or said.linear_factor or 1.0
    if said.type == "yarn":
        if divisors is not None:
            raise UserError(f"{where} has both YaRN and divisors of rotary frequencies, expected one of them")
        return _yarn(said, model, factor, where)
    if said.attention_factor != 1.0:
        raise UserError(
            f"{where} has {KEYS['attention_factor']}: {said.attention_factor} without YaRN, which is not supported; "
            "expected 1.0"
        )
    if divisors is not None:
        return checked(DivisorScaling, where, divisors=[factor * divisor for divisor in divisors])
    return None if factor == 1.0 else checked(LinearScaling, where, factor=factor)


def _yarn(said: _Rope, model: _Model, factor: float, where: str) -> YarnScaling:
    multiplier = said.log_multiplier
    magnitude = yarn_ratio(factor, 1.0, multiplier) if multiplier else yarn_magnitude(factor)
    return checked(
        YarnScaling,
        where,
        factor=factor,
        original_context=said.original_context or model.context_length,
        beta_fast=said.beta_fast,
        beta_slow=said.beta_slow,
        attention_factor=magnitude * said.attention_factor,
    )


def _queries(said: _Rope, model: _Model, where: str) -> QueryScaling | None:
    if not model.temperature:
        return None
    return checked(QueryScaling, where, beta=model.temperature, original_context=said.original_context)
