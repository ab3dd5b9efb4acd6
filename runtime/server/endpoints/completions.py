"""`POST /v1/completions`: texts that are continued, whole or as a stream."""

from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from runtime.errors import UserError
from runtime.server.answers.given_texts import check_ids, separate_texts
from runtime.server.answers.logprobs import by_text, prompt_logprobs, shown, token_text
from runtime.server.answers.merging import merged
from runtime.server.answers.replying import Wanted, begin, steps_of, text_streams, usage_of
from runtime.server.answers.sampling import choices_of, limit_of, options_of, stops_of
from runtime.server.answers.whole_texts import check_head
from runtime.server.api.common import FinishReason, Usage
from runtime.server.api.completions import (
    CompletionChoice,
    CompletionLogprobs,
    CompletionRequest,
    CompletionResponse,
)
from runtime.server.http.bodies import json_answer
from runtime.server.http.event_stream import DONE, EventStream, event_of, unless_client_leaves
from runtime.server.http.failures import refused
from runtime.server.running.generations import Generation
from runtime.server.running.served_model import ServedModel
from runtime.server.service import Service
from runtime.text.fill_in_the_middle import encode_fill_in
from runtime.text.stream import Step

MOST_PROMPTS = 64  # of a request


@dataclass(frozen=True)
class Continued:
    """One prompt that is being continued; `echo` is the text that comes before what is generated."""

    wanted: Wanted
    generation: Generation
    echo: str


@dataclass
class Offsets:
    """Where the tokens of one choice begin in its text."""

    length: int

    def logprobs_of(self, model: ServedModel, step: Step) -> CompletionLogprobs | None:
        """Log probabilities of one more token; None if they were not asked for."""
        if step.logprob is None:
            return None
        offset, token = self.length, token_text(model.tokenizer, step.token_id)
        self.length += len(token)
        likeliest = by_text(model.tokenizer, step.logprobs or ())
        return CompletionLogprobs([token], [shown(step.logprob)], [likeliest], [offset])


@dataclass(frozen=True)
class Completion:
    """One request that is being answered."""

    request: CompletionRequest
    service: Service
    model: ServedModel
    prompts: Sequence[Continued]
    answer_id: str
    created: int

    @property
    def generations(self) -> list[Generation]:
        """The generation of each prompt."""
        return [each.generation for each in self.prompts]

    def cancel(self) -> None:
        """End what still runs."""
        for generation in self.generations:
            generation.cancel()

    async def pieces(self) -> AsyncGenerator[CompletionChoice]:
        """More of each text, as it comes; the first piece of an echo is the prompt."""
        async with aclosing(merged([self._pieces_of(i) for i in range(len(self.prompts))])) as pieces:
            async for piece in pieces:
                yield piece

    async def _pieces_of(self, number: int) -> AsyncGenerator[CompletionChoice]:
        prompt = self.prompts[number]
        first = number * prompt.wanted.choices
        offsets = [Offsets(len(prompt.echo)) for _ in range(prompt.wanted.choices)]
        echoes = self._echoes_of(prompt, first) if self.request.echo else iter(())
        async with aclosing(steps_of(prompt.generation, text_streams(self.model, prompt.wanted))) as steps:
            async for index, step in steps:
                for echo in echoes:
                    yield echo
                logprobs = offsets[index].logprobs_of(self.model, step)
                if step.text or logprobs or step.finish_reason:
                    yield CompletionChoice(first + index, step.text, logprobs, step.finish_reason)
        for echo in echoes:  # nothing has followed
            yield echo

    def _echoes_of(self, prompt: Continued, first: int) -> Iterator[CompletionChoice]:
        """The prompt, once for each choice; its tokens are scored by then if that was asked for."""
        logprobs = None
        if self.request.logprobs is not None:
            logprobs = prompt_logprobs(self.model.tokenizer, prompt.wanted.prompt_ids, prompt.generation.prompt_scores)
        reason: FinishReason | None = "length" if prompt.wanted.max_tokens == 0 else None
        for index in range(prompt.wanted.choices):
            yield CompletionChoice(first + index, prompt.echo, logprobs, reason)


@dataclass
class Text:
    """One text as far as it has come."""

    text: str = ""
    logprobs: list[CompletionLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, piece: CompletionChoice) -> None:
        """Add a piece."""
        self.text += piece.text
        self.logprobs += [] if piece.logprobs is None else [piece.logprobs]
        self.finish_reason = piece.finish_reason or self.finish_reason

    def joined_logprobs(self) -> CompletionLogprobs | None:
        """The log probabilities of all tokens; None if there are none."""
        if not self.logprobs:
            return None
        return CompletionLogprobs(
            [token for each in self.logprobs for token in each.tokens],
            [number for each in self.logprobs for number in each.token_logprobs],
            [likeliest for each in self.logprobs for likeliest in each.top_logprobs or ()],
            [offset for each in self.logprobs for offset in each.text_offset],
        )


async def answer(service: Service, request: Request, asked: CompletionRequest) -> Response:
    """Answer a request; raises `RequestFailure` for one that cannot be answered."""
    begun = await _begin(service, asked)
    if asked.stream:
        return EventStream(_stream(begun), service.settings.ping_seconds)
    return json_answer(await unless_client_leaves(request, _whole(begun)))


async def _begin(service: Service, asked: CompletionRequest) -> Completion:
    model = service.model(asked.model)
    check_head(model, ("causal_lm",))
    options, stops, choices = options_of(asked, model), stops_of(asked), choices_of(asked, service.settings)
    _check(asked, choices)
    prompts = separate_texts(asked.prompt, MOST_PROMPTS, "prompt")
    most = service.settings.max_queued + service.generations.slots
    sequences = len(prompts) * choices
    if len(prompts) > 1 and sequences > most:
        raise refused(
            f"{len(prompts)} prompts with n = {choices} are {sequences} sequences, expected at most {most}; "
            "send fewer at a time",
            param="prompt",
        )
    service.generations.check_place(sequences)
    try:
        ids = await service.encode(lambda: [_ids(prompt, asked.suffix, model) for prompt in prompts])
    except UserError as error:
        raise refused(str(error), param="prompt") from error
    # for all at once, since a request must not be refused for its own prompts
    service.generations.check_place(sequences, sum(map(len, ids)) * choices)
    begun: list[Continued] = []
    try:
        for number, prompt_ids in enumerate(ids):
            wanted = Wanted(
                prompt_ids,
                options.numbered(number * choices),
                limit_of(asked),
                choices,
                stops,
                asked.logprobs,
                asked.ignore_eos,
                continues=asked.suffix is None,
                prompt_logprobs=_scored(asked),
            )
            begun.append(Continued(wanted, begin(service, model, wanted), _echo(asked, prompts[number], model)))
    except BaseException:
        for each in begun:
            each.generation.cancel()
        raise
    return Completion(asked, service, model, begun, service.new_answer_id("cmpl"), service.now())


def _check(asked: CompletionRequest, choices: int) -> None:
    if asked.best_of is not None and asked.best_of != choices:
        raise refused(f"best_of is {asked.best_of}, expected n, which is {choices}: all are returned", param="best_of")
    if asked.stream_options is not None and not asked.stream:
        raise refused("stream_options needs stream: true", param="stream_options")
    if asked.max_tokens == 0 and (not asked.echo or choices > 1):
        raise refused(
            "max_tokens is 0, expected at least 1: only echo, with one choice, may generate nothing", param="max_tokens"
        )
    if asked.suffix is not None and asked.echo:
        raise refused("echo has no meaning beside suffix; leave it out", param="echo")


def _ids(prompt: str | list[int], suffix: str | None, model: ServedModel) -> list[int]:
    """Ids of one prompt; raises `UserError` or `RequestFailure` if there are none."""
    if isinstance(prompt, str):
        model.tokenizer.check_length(len(prompt) + len(suffix or ""), model.capacity)
        return model.tokenizer.encode(prompt) if suffix is None else encode_fill_in(model.tokenizer, prompt, suffix)
    if suffix is not None:
        raise refused("suffix needs a prompt that is a text", param="suffix")
    check_ids(prompt, model.config.vocab_size, "prompt")
    return prompt


def _echo(asked: CompletionRequest, prompt: str | list[int], model: ServedModel) -> str:
    if not asked.echo:
        return ""
    return prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt)


def _scored(asked: CompletionRequest) -> int | None:
    """How many likely tokens are wanted in the place of each of the prompt's; None if these are not to be scored."""
    if not asked.echo or (asked.logprobs is None and asked.max_tokens != 0):
        return None
    return asked.logprobs or 0


async def _whole(begun: Completion) -> CompletionResponse:
    texts = [Text() for each in begun.prompts for _ in range(each.wanted.choices)]
    async with aclosing(begun.pieces()) as pieces:
        async for piece in pieces:
            texts[piece.index].add(piece)
    choices = [
        CompletionChoice(index, each.text, each.joined_logprobs(), each.finish_reason)
        for index, each in enumerate(texts)
    ]
    return _response(begun, choices, usage_of(begun.generations))


async def _stream(begun: Completion) -> AsyncGenerator[bytes]:
    options = begun.request.stream_options
    usage = options is not None and options.include_usage
    try:
        async with aclosing(begun.pieces()) as pieces:
            async for piece in pieces:
                yield event_of(_response(begun, [piece], None if usage else msgspec.UNSET))
    finally:
        begun.cancel()
    if usage:
        yield event_of(_response(begun, [], usage_of(begun.generations)))
    yield DONE


def _response(
    begun: Completion, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None
) -> CompletionResponse:
    return CompletionResponse(
        id=begun.answer_id, created=begun.created, model=begun.service.name, choices=choices, usage=usage
    )
