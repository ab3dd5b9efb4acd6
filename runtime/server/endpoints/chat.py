"""`POST /v1/chat/completions`: answers to a conversation, whole or as a stream."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from runtime.errors import UserError
from runtime.server.api import chat
from runtime.server.api.common import FinishReason, Usage
from runtime.server.bodies import json_answer, read_request
from runtime.server.conversations import conversation_ids
from runtime.server.event_stream import DONE, EventStream, event_of, unless_client_leaves
from runtime.server.failures import refused
from runtime.server.generations import Generation
from runtime.server.logprobs import chat_logprobs
from runtime.server.replying import Wanted, begin, steps_of, text_streams, usage_of
from runtime.server.sampling import choices_of, options_of, stops_of
from runtime.server.served_model import ServedModel
from runtime.server.service import Service
from runtime.server.whole_texts import check_head


@dataclass(frozen=True)
class Chat:
    """One request that is being answered."""

    request: chat.ChatRequest
    service: Service
    model: ServedModel
    wanted: Wanted
    generation: Generation
    answer_id: str
    created: int

    async def pieces(self) -> AsyncGenerator[chat.ChunkChoice]:
        """More of each choice, as it comes; the last of each has its finish reason."""
        async with aclosing(steps_of(self.generation, text_streams(self.model, self.wanted))) as steps:
            async for index, step in steps:
                logprobs = chat_logprobs(self.model.tokenizer, step) if self.request.logprobs else None
                if step.text or logprobs or step.finish_reason:
                    delta = chat.Delta(content=step.text) if step.text else chat.Delta()
                    stop = msgspec.UNSET if step.stop is None else step.stop
                    yield chat.ChunkChoice(index, delta, logprobs, step.finish_reason, stop)

    def usage(self) -> Usage:
        """The tokens of the request, once all choices are over."""
        return usage_of([self.generation])


@dataclass
class Answer:
    """One choice as far as it has come."""

    content: str = ""
    reasoning: str | None = None
    calls: list[chat.ToolCall] = field(default_factory=list)
    logprobs: list[chat.TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = "stop"

    def add(self, piece: chat.ChunkChoice) -> None:
        """Add what a piece says."""
        if piece.delta.content is not msgspec.UNSET:
            self.content += piece.delta.content
        if piece.logprobs is not None:
            self.logprobs += piece.logprobs.content
        if piece.finish_reason is not None:
            self.finish_reason = piece.finish_reason


async def begin_chat(service: Service, asked: chat.ChatRequest) -> Chat:
    """Hand a request to the engine; raises `RequestFailure` for one that cannot be answered."""
    model = service.model(asked.model)
    check_head(model, ("causal_lm",))
    service.generations.check_place(asked.n or 1)
    wanted = await _wanted(asked, service, model)
    generation = begin(service, model, wanted)
    return Chat(asked, service, model, wanted, generation, service.new_answer_id("chatcmpl"), service.now())


async def _wanted(asked: chat.ChatRequest, service: Service, model: ServedModel) -> Wanted:
    if asked.top_logprobs is not None and not asked.logprobs:
        raise refused("top_logprobs needs logprobs: true", param="top_logprobs")
    if asked.stream_options is not None and not asked.stream:
        raise refused("stream_options needs stream: true", param="stream_options")
    options, stops, choices = options_of(asked, model), stops_of(asked), choices_of(asked, service.settings)
    tools = asked.tools or []
    try:
        ids = await service.encode(lambda: conversation_ids(model, asked.messages, tools))
    except UserError as error:
        raise refused(str(error), param="messages") from error
    return Wanted(
        ids,
        options,
        asked.max_completion_tokens or asked.max_tokens,
        choices,
        stops,
        (asked.top_logprobs or 0) if asked.logprobs else None,
        asked.ignore_eos,
    )


async def answer(service: Service, request: Request) -> Response:
    """Answer a request; raises `RequestFailure` for one that cannot be answered."""
    asked = await read_request(request, chat.ChatRequest, service.settings.max_body_bytes)
    begun = await begin_chat(service, asked)
    if asked.stream:
        return EventStream(stream(begun), service.settings.ping_seconds)
    return json_answer(await unless_client_leaves(request, whole(begun)))


async def whole(begun: Chat) -> chat.ChatResponse:
    """The answer as one object."""
    answers = [Answer() for _ in range(begun.wanted.choices)]
    async with aclosing(begun.pieces()) as pieces:
        async for piece in pieces:
            answers[piece.index].add(piece)
    choices = [
        chat.ChatChoice(
            index,
            chat.ReplyMessage(
                content=each.content if each.content or not each.calls else None,
                reasoning_content=msgspec.UNSET if each.reasoning is None else each.reasoning,
                tool_calls=each.calls or msgspec.UNSET,
            ),
            chat.ChoiceLogprobs(each.logprobs) if begun.request.logprobs else None,
            each.finish_reason,
        )
        for index, each in enumerate(answers)
    ]
    return chat.ChatResponse(
        id=begun.answer_id, created=begun.created, model=begun.service.name, choices=choices, usage=begun.usage()
    )


async def stream(begun: Chat) -> AsyncGenerator[bytes]:
    """The answer as events: the role of each choice at once, its pieces as they come, at the end the usage."""
    options = begun.request.stream_options
    usage = options is not None and options.include_usage

    def chunk(choices: list[chat.ChunkChoice], counted: Usage | None = None) -> bytes:
        return event_of(
            chat.ChatChunk(
                id=begun.answer_id,
                created=begun.created,
                model=begun.service.name,
                choices=choices,
                usage=counted if usage else msgspec.UNSET,
            )
        )

    async with aclosing(begun.pieces()) as pieces:
        first = chat.Delta(role="assistant", content="")
        for index in range(begun.wanted.choices):
            yield chunk([chat.ChunkChoice(index, first, None, None)])
        async for piece in pieces:
            yield chunk([piece])
    if usage:
        yield chunk([], begun.usage())
    yield DONE
