"""`POST /v1/responses`: OpenAI's Responses API over chat, without anything stored."""

from starlette.requests import Request
from starlette.responses import Response

from runtime.server.api import responses as api
from runtime.server.api.response_events import Event
from runtime.server.converters.responses_input import as_asked_here, chat_request
from runtime.server.converters.responses_output import ResponseWriter
from runtime.server.endpoints.chat import Chat, begin_chat
from runtime.server.endpoints.converted import write_all, written
from runtime.server.http.bodies import json_answer
from runtime.server.http.event_stream import EventStream, event_of, unless_client_leaves
from runtime.server.http.failures import RequestFailure
from runtime.server.service import Service


async def answer(service: Service, request: Request, asked: api.ResponsesRequest) -> Response:
    """Answer a request; raises `RequestFailure` for one that cannot be answered."""
    try:
        begun = await begin_chat(service, chat_request(asked))
    except RequestFailure as failure:
        raise as_asked_here(failure) from failure
    writer = ResponseWriter(asked, service.new_answer_id("resp"), begun.created, service.name)
    if asked.stream:
        return EventStream(
            written(begun, writer, _event),
            service.settings.ping_seconds,
            failed=lambda failure: _event(writer.fail(failure)),
        )
    return json_answer(await unless_client_leaves(request, _whole(begun, writer)))


async def _whole(begun: Chat, writer: ResponseWriter) -> api.Response:
    return writer.response(await write_all(begun, writer))


def _event(event: Event) -> bytes:
    return event_of(event, event.type)
