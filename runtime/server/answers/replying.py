"""From a request's tokens to pieces of text, for every endpoint that generates."""

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from runtime.decoding.constraint import Grammar
from runtime.decoding.options import SamplingOptions
from runtime.errors import UserError
from runtime.scheduling.prefix_cache import check_fits
from runtime.scheduling.requests import Generated, Request, Scored
from runtime.server.api.common import CompletionTokensDetails, PromptTokensDetails, Usage
from runtime.server.http.failures import refused
from runtime.server.http.request_log import log_generation
from runtime.server.running.generations import Generation
from runtime.server.running.served_model import ServedModel
from runtime.server.service import Service
from runtime.text.stream import Step, TextStream, with_text


@dataclass(frozen=True)
class Wanted:
    """What is to be generated after a prompt; `max_tokens` None is the server's default.

    continues: whether the text goes on from the prompt's, as a completion does.
    prompt_logprobs: how many of the likeliest tokens are listed in the place of each of the prompt's; None scores none.
    """

    prompt_ids: Sequence[int]
    options: SamplingOptions
    max_tokens: int | None
    choices: int
    stops: Sequence[str] = ()
    logprobs: int | None = None
    ignore_eos: bool = False
    continues: bool = False
    grammar: Grammar | None = None
    prompt_logprobs: int | None = None


def begin(service: Service, model: ServedModel, wanted: Wanted) -> Generation:
    """Hand a request, for which a place was found, to the engine; raises `RequestFailure` if it cannot fit."""
    service.check_not_ended()
    try:
        check_fits(wanted.prompt_ids, model.capacity)
    except UserError as error:
        raise refused(str(error), code="context_length_exceeded") from error
    try:
        request = Request(
            service.generations.new_id(),
            wanted.prompt_ids,
            service.settings.default_max_tokens if wanted.max_tokens is None else wanted.max_tokens,
            wanted.options,
            () if wanted.ignore_eos else model.eos_ids,
            wanted.logprobs,
            wanted.choices,
            wanted.grammar,
            prompt_logprobs=wanted.prompt_logprobs,
        )
    except UserError as error:
        raise refused(str(error)) from error
    generation = service.generations.submit(request)
    log_generation(generation, model.tokenizer, texts=service.settings.log_prompts)
    return generation


def text_streams(model: ServedModel, wanted: Wanted) -> list[TextStream]:
    """The text of each choice."""
    after = wanted.prompt_ids if wanted.continues else ()
    return [model.tokenizer.text_stream(wanted.stops, after) for _ in range(wanted.choices)]


async def steps_of(generation: Generation, texts: Sequence[TextStream]) -> AsyncGenerator[tuple[int, Step]]:
    """Steps of all choices with their texts, as they come; the last of each has a finish reason.

    Closing the generator early ends the request. Raises `RequestFailure` if a choice fails.
    """
    try:
        async for event in generation.events():
            if isinstance(event, Scored):
                generation.prompt_scores += event.tokens
            if not isinstance(event, Generated):
                continue
            step = next(with_text(iter((event.step,)), texts[event.choice]))
            generation.take(event.choice, step)
            if step.finish_reason is not None and event.step.finish_reason is None:
                generation.end_choice(event.choice)
            yield event.choice, step
    finally:
        generation.cancel()


def usage_of(generations: Sequence[Generation], reasoning: int = 0) -> Usage:
    """The tokens of a request that has so many generations, one for each prompt, as far as they were read."""
    prompt = sum(len(each.request.prompt_ids) for each in generations)
    cached = sum(each.times[0].cached_tokens for each in generations)
    generated = sum(each.counted for each in generations)
    return Usage(prompt, generated, prompt + generated, PromptTokensDetails(cached), CompletionTokensDetails(reasoning))
