"""`POST /v1/messages`: Anthropic's Messages API over chat; and how many tokens a conversation has."""

from starlette.requests import Request
from starlette.responses import Response

from runtime.errors import UserError
from runtime.server.answers.conversations import conversation_ids, tools_of
from runtime.server.answers.whole_texts import check_head
from runtime.server.api import messages as api
from runtime.server.converters.messages_input import chat_messages, chat_request, chat_tools
from runtime.server.converters.messages_output import MessageWriter, error_of
from runtime.server.endpoints.chat import Chat, begin_chat
from runtime.server.endpoints.converted import write_all, written
from runtime.server.http.bodies import json_answer
from runtime.server.http.event_stream import EventStream, event_of, unless_client_leaves
from runtime.server.http.failures import refused
from runtime.server.service import Service


async def answer(service: Service, request: Request, asked: api.MessagesRequest) -> Response:
    """Answer a request; raises `RequestFailure` for one that cannot be answered."""
    begun = await begin_chat(service, chat_request(asked))
    writer = MessageWriter(service.new_answer_id("msg"), service.name, len(begun.wanted.prompt_ids))
    if asked.stream:
        return EventStream(
            written(begun, writer, _event),
            service.settings.ping_seconds,
            ping=_event(api.Ping()),
            failed=lambda failure: _event(error_of(failure)),
        )
    return json_answer(await unless_client_leaves(request, _whole(begun, writer)))


async def count(service: Service, _request: Request, asked: api.CountRequest) -> Response:
    """The tokens of a conversation; raises `RequestFailure` for one that the model's format does not allow."""
    model = service.model(asked.model)
    check_head(model, ("causal_lm",))
    try:
        ids = await service.encode(lambda: conversation_ids(model, chat_messages(asked), tools_of(chat_tools(asked))))
    except UserError as error:
        raise refused(str(error), param="messages") from error
    return json_answer(api.CountResponse(len(ids)))


async def _whole(begun: Chat, writer: MessageWriter) -> api.Reply:
    return writer.message(await write_all(begun, writer))


def _event(event: api.Event) -> bytes:
    return event_of(event, str(event.__struct_config__.tag))
