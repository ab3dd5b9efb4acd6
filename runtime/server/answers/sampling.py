"""The sampling fields of a request as the engine takes them."""

from collections.abc import Sequence

from runtime.decoding.options import MOST_BIASES, SamplingOptions
from runtime.server.api.common import SamplingFields
from runtime.server.http.failures import refused
from runtime.server.running.served_model import ServedModel
from runtime.server.settings import ServerSettings

DEFAULT_TEMPERATURE = 1.0  # of OpenAI's API
SEEDS = 2**64  # negative ones are the largest
MOST_STOPS, LONGEST_STOP = 16, 1024  # stop strings of a request, and characters of one


def options_of(fields: SamplingFields, model: ServedModel) -> SamplingOptions:
    """How a request wants its tokens drawn; raises `RequestFailure` for what this model cannot do."""
    if fields.store:
        raise refused("store is true, but nothing is stored here; leave it out", param="store")
    if fields.metadata:
        raise refused("metadata is set, but nothing is stored here; leave it out", param="metadata")
    return SamplingOptions(
        temperature=DEFAULT_TEMPERATURE if fields.temperature is None else fields.temperature,
        top_k=fields.top_k if fields.top_k is not None and fields.top_k > 0 else None,
        top_p=None if fields.top_p == 1 else fields.top_p,
        min_p=fields.min_p or None,
        repetition_penalty=None if fields.repetition_penalty == 1 else fields.repetition_penalty,
        seed=None if fields.seed is None else fields.seed % SEEDS,
        presence_penalty=fields.presence_penalty or None,
        frequency_penalty=fields.frequency_penalty or None,
        logit_bias=_biases(fields, model.config.vocab_size),
    )


def _biases(fields: SamplingFields, vocab_size: int) -> dict[int, float] | None:
    if not fields.logit_bias:
        return None
    if len(fields.logit_bias) > MOST_BIASES:
        raise refused(
            f"logit_bias has {len(fields.logit_bias)} entries, expected at most {MOST_BIASES}", param="logit_bias"
        )
    biases = {}
    for name, bias in fields.logit_bias.items():
        if not (name.isascii() and name.isdecimal() and len(name) < 10 and int(name) < vocab_size):
            raise refused(
                f"logit_bias names the token {name!r}, expected an id from 0 to {vocab_size - 1}", param="logit_bias"
            )
        biases[int(name)] = bias
    return biases


def stops_of(fields: SamplingFields) -> Sequence[str]:
    """The stop strings of a request; raises `RequestFailure` for too many, and for one that is empty or too long."""
    stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
    if len(stops) > MOST_STOPS:
        raise refused(f"stop has {len(stops)} texts, expected at most {MOST_STOPS}", param="stop")
    for stop in stops:
        if not 1 <= len(stop) <= LONGEST_STOP:
            raise refused(f"stop has a text of {len(stop)} characters, expected 1 to {LONGEST_STOP}", param="stop")
    return stops


def limit_of(fields: SamplingFields) -> int | None:
    """The most tokens of an answer, by either name; raises `RequestFailure` if the two names differ in it."""
    newer, older = fields.max_completion_tokens, fields.max_tokens
    if None not in (newer, older) and newer != older:
        raise refused(
            f"max_completion_tokens is {newer} and max_tokens is {older}, which mean the same; leave one out",
            param="max_tokens",
        )
    return older if newer is None else newer


def choices_of(fields: SamplingFields, settings: ServerSettings) -> int:
    """How many answers a request wants; raises `RequestFailure` for more than the settings allow."""
    choices = fields.n or 1
    if choices > settings.max_choices:
        raise refused(f"n is {choices}, expected at most {settings.max_choices}", param="n")
    return choices
