"""`POST /tokenize` and `POST /detokenize`."""

from starlette.requests import Request
from starlette.responses import Response

from runtime.errors import UserError
from runtime.server.answers.conversations import conversation_ids, tools_of
from runtime.server.api.tokens import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse
from runtime.server.http.bodies import json_answer
from runtime.server.http.failures import refused
from runtime.server.running.served_model import ServedModel
from runtime.server.service import Service

MOST_IDS = 2**18  # that a request may turn into text, which is done one by one


async def tokenize(service: Service, _request: Request, asked: TokenizeRequest) -> Response:
    """Token ids of a text or a conversation."""
    model = service.model(asked.model)
    if (asked.prompt is None) == (asked.messages is None):
        raise refused("pass either prompt or messages", param="prompt")
    if asked.tools and asked.messages is None:
        raise refused("tools are part of a conversation; pass messages", param="tools")
    try:
        ids = await service.encode(lambda: _ids(asked, model))
    except UserError as error:
        raise refused(str(error), param="prompt" if asked.messages is None else "messages") from error
    return json_answer(TokenizeResponse(len(ids), model.capacity, ids))


def _ids(asked: TokenizeRequest, model: ServedModel) -> list[int]:
    if asked.messages is not None:
        return conversation_ids(model, asked.messages, tools_of(asked.tools or []))
    text = asked.prompt or ""
    return model.tokenizer.encode(text, add_bos=None if asked.add_special_tokens else False)


async def detokenize(service: Service, _request: Request, asked: DetokenizeRequest) -> Response:
    """The text of token ids; raises `RequestFailure` for an id outside the vocabulary."""
    model = service.model(asked.model)
    largest = max(asked.tokens, default=0)
    if largest >= model.config.vocab_size:
        raise refused(
            f"tokens has the id {largest}, expected 0 to {model.config.vocab_size - 1}, the ids of the vocabulary",
            param="tokens",
        )
    if len(asked.tokens) > MOST_IDS:
        raise refused(f"tokens has {len(asked.tokens)} ids, expected at most {MOST_IDS}", param="tokens")
    text = await service.encode(lambda: model.tokenizer.decode(asked.tokens))
    return json_answer(DetokenizeResponse(text))
