"""`POST /v1/chat/completions`: answers to a conversation, whole or as a stream."""

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from runtime.decoding.constraint import Grammar
from runtime.decoding.reply_grammar import ReplyRules
from runtime.errors import UserError
from runtime.server.answers.conversations import conversation_ids
from runtime.server.answers.logprobs import chat_logprobs
from runtime.server.answers.reply_rules import rules_of
from runtime.server.answers.replying import Wanted, begin, steps_of, text_streams, usage_of
from runtime.server.answers.sampling import choices_of, limit_of, options_of, stops_of
from runtime.server.answers.whole_texts import check_head
from runtime.server.api import chat
from runtime.server.api.common import FinishReason, Usage
from runtime.server.http.bodies import json_answer
from runtime.server.http.event_stream import DONE, EventStream, event_of, unless_client_leaves
from runtime.server.http.failures import refused
from runtime.server.running.generations import Generation
from runtime.server.running.served_model import ServedModel
from runtime.server.service import Service
from runtime.text.deltas import ArgumentsDelta, CallDelta, Delta, ReasoningDelta, TextDelta
from runtime.text.replies import ends_in_thought
from runtime.text.reply_stream import ReplyStream


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
    reasoning: list[int] = field(default_factory=list)  # ids of all choices that were thoughts

    async def pieces(self) -> AsyncGenerator[chat.ChunkChoice]:
        """More of each choice, as it comes; the last of each has its finish reason."""
        in_thought = ends_in_thought(self.wanted.prompt_ids, self.model.tokenizer)
        dividers = self.model.tokenizer.dividers
        replies = [ReplyStream(dividers, in_thought=in_thought) for _ in range(self.wanted.choices)]
        async with aclosing(steps_of(self.generation, text_streams(self.model, self.wanted))) as steps:
            async for index, step in steps:
                self.reasoning.extend([step.token_id] if replies[index].in_thought else [])
                deltas = replies[index].push(step)
                reason: FinishReason | None = step.finish_reason
                if reason is not None:
                    deltas += replies[index].finish(step.finish_reason)
                    reason = "tool_calls" if reason == "stop" and replies[index].has_calls else reason
                logprobs = chat_logprobs(self.model.tokenizer, step) if self.request.logprobs else None
                if deltas or logprobs or reason:
                    stop = msgspec.UNSET if step.stop is None else step.stop
                    yield chat.ChunkChoice(index, delta_of(deltas), logprobs, reason, stop)

    @asynccontextmanager
    async def answering(self) -> AsyncIterator[AsyncGenerator[chat.ChunkChoice]]:
        """The pieces; the request ends with the context, also if none was read."""
        try:
            async with aclosing(self.pieces()) as pieces:
                yield pieces
        finally:
            self.generation.cancel()

    def usage(self) -> Usage:
        """The tokens of the request, once all choices are over."""
        return usage_of([self.generation], len(self.reasoning))


@dataclass
class Answer:
    """One choice as far as it has come."""

    content: str = ""
    reasoning: str | None = None
    calls: list[chat.ToolCall] = field(default_factory=list)
    logprobs: list[chat.TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    stop_reason: str | msgspec.UnsetType = msgspec.UNSET

    def add(self, piece: chat.ChunkChoice) -> None:
        """Add what a piece says."""
        delta = piece.delta
        if delta.content is not msgspec.UNSET:
            self.content += delta.content
        if delta.reasoning_content is not msgspec.UNSET:
            self.reasoning = (self.reasoning or "") + delta.reasoning_content
        for call in () if delta.tool_calls is msgspec.UNSET else delta.tool_calls:
            self._add_call(call)
        if piece.logprobs is not None:
            self.logprobs += piece.logprobs.content
        if piece.finish_reason is not None:
            self.finish_reason, self.stop_reason = piece.finish_reason, piece.stop_reason

    def _add_call(self, more: chat.ToolCallDelta) -> None:
        if more.id is not msgspec.UNSET and more.function.name is not msgspec.UNSET:
            self.calls.append(chat.ToolCall(more.id, chat.CalledFunction(more.function.name, more.function.arguments)))
            return
        call = self.calls[more.index]
        function = chat.CalledFunction(call.function.name, call.function.arguments + more.function.arguments)
        self.calls[more.index] = chat.ToolCall(call.id, function)


def delta_of(deltas: Sequence[Delta]) -> chat.Delta:
    """The parts of a reply that came together, as one piece of an answer."""
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    reasoning = "".join(delta.text for delta in deltas if isinstance(delta, ReasoningDelta))
    calls = [_call_delta(delta) for delta in deltas if isinstance(delta, CallDelta | ArgumentsDelta)]
    return chat.Delta(
        content=text or msgspec.UNSET,
        reasoning_content=reasoning or msgspec.UNSET,
        tool_calls=calls or msgspec.UNSET,
    )


def _call_delta(delta: CallDelta | ArgumentsDelta) -> chat.ToolCallDelta:
    if isinstance(delta, ArgumentsDelta):
        return chat.ToolCallDelta(index=delta.index, function=chat.FunctionDelta(arguments=delta.text))
    function = chat.FunctionDelta(name=delta.name, arguments="")
    return chat.ToolCallDelta(index=delta.index, id=delta.call_id, type="function", function=function)


async def begin_chat(service: Service, asked: chat.ChatRequest) -> Chat:
    """Hand a request to the engine; raises `RequestFailure` for one that cannot be answered."""
    model = service.model(asked.model)
    check_head(model, ("causal_lm",))
    service.generations.check_place(asked.n or 1)
    wanted = await _wanted(asked, service, model)
    service.generations.check_place(wanted.choices, wanted.choices * len(wanted.prompt_ids))
    generation = begin(service, model, wanted)
    return Chat(asked, service, model, wanted, generation, service.new_answer_id("chatcmpl"), service.now())


async def _wanted(asked: chat.ChatRequest, service: Service, model: ServedModel) -> Wanted:
    if asked.top_logprobs is not None and not asked.logprobs:
        raise refused("top_logprobs needs logprobs: true", param="top_logprobs")
    if asked.stream_options is not None and not asked.stream:
        raise refused("stream_options needs stream: true", param="stream_options")
    options, stops, choices = options_of(asked, model), stops_of(asked), choices_of(asked, service.settings)
    rules = rules_of(asked)
    tools = () if rules.tool_choice == "none" else rules.tools
    try:
        ids = await service.encode(lambda: conversation_ids(model, asked.messages, tools))
    except UserError as error:
        raise refused(str(error), param="messages") from error
    try:
        grammar = await service.encode(lambda: _grammar(model, rules, ids))
    except UserError as error:
        raise refused(str(error), param="response_format" if rules.answer else "tools") from error
    return Wanted(
        ids,
        options,
        limit_of(asked),
        choices,
        stops,
        (asked.top_logprobs or 0) if asked.logprobs else None,
        asked.ignore_eos,
        grammar=grammar,
    )


def _grammar(model: ServedModel, rules: ReplyRules, prompt: Sequence[int]) -> Grammar | None:
    """The grammar that a reply must keep to; a request that asks for none needs no package for grammars."""
    if rules.answer is None and not rules.tools:
        return None
    return model.grammars.compile(rules, in_thought=ends_in_thought(prompt, model.tokenizer))


async def answer(service: Service, request: Request, asked: chat.ChatRequest) -> Response:
    """Answer a request; raises `RequestFailure` for one that cannot be answered."""
    begun = await begin_chat(service, asked)
    if asked.stream:
        return EventStream(stream(begun), service.settings.ping_seconds)
    return json_answer(await unless_client_leaves(request, whole(begun)))


async def whole(begun: Chat) -> chat.ChatResponse:
    """The answer as one object."""
    answers = [Answer() for _ in range(begun.wanted.choices)]
    async with begun.answering() as pieces:
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
            each.stop_reason,
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

    async with begun.answering() as pieces:
        first = chat.Delta(role="assistant", content="")
        for index in range(begun.wanted.choices):
            yield chunk([chat.ChunkChoice(index, first, None, None)])
        async for piece in pieces:
            yield chunk([piece])
    if usage:
        yield chunk([], begun.usage())
    yield DONE
